{{- define "paged.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "paged.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "paged.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "paged.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "paged.secret" -}}
{{ .Values.apiKey.existingSecret | default (printf "%s-api-key" (include "paged.name" .)) }}
{{- end }}

{{- define "paged.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "paged.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "paged.apiKeyEnv" -}}
- name: PAGED_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "paged.secret" . }}
      key: apiKey
{{- end }}

{{- define "paged.gatewayProbes" -}}
startupProbe:
  httpGet: {path: /health, port: openai}
  periodSeconds: 5
  failureThreshold: {{ max 1 (div .Values.startSeconds 5) }}
readinessProbe: # follows the engine: 503 while no model is ready
  httpGet: {path: /health, port: openai}
  periodSeconds: 5
  failureThreshold: 2
livenessProbe:
  tcpSocket: {port: openai}
  periodSeconds: 10
  failureThreshold: 6
{{- end }}
