"""The `format`s of JSON Schema as patterns: each takes only what is of the format, most of them not all of it (names of
hosts have six labels at most).
"""

from __future__ import annotations

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(?:\d{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_LONG_MONTHS = r"(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])"
_SHORT_MONTHS = r"(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
_DATE = rf"(?:{_YEAR}-(?:{_LONG_MONTHS}|{_SHORT_MONTHS}|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
# no leap second: most days have none
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_COUNT = r"\d{1,9}"
_CLOCK = rf"T(?:{_COUNT}H(?:{_COUNT}M(?:{_COUNT}S)?)?|{_COUNT}M(?:{_COUNT}S)?|{_COUNT}S)"
_DAYS = rf"(?:{_COUNT}Y(?:{_COUNT}M(?:{_COUNT}D)?)?|{_COUNT}M(?:{_COUNT}D)?|{_COUNT}D)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,39}[A-Za-z0-9])?"
_LAST_LABEL = r"[A-Za-z](?:[A-Za-z0-9-]{0,39}[A-Za-z0-9])?"  # no number, or it might be an address
_HOST = rf"(?:{_LABEL}\.){{0,5}}{_LAST_LABEL}"  # 251 characters at most; 253 are allowed
_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_H = r"[0-9A-Fa-f]{1,4}"
_IPV6 = (
    rf"(?:(?:{_H}:){{7}}{_H}|(?:{_H}:){{1,7}}:|(?:{_H}:){{1,6}}:{_H}|(?:{_H}:){{1,5}}(?::{_H}){{1,2}}|(?:{_H}:){{1,4}}(?::{_H}){{1,3}}"
    rf"|(?:{_H}:){{1,3}}(?::{_H}){{1,4}}|(?:{_H}:){{1,2}}(?::{_H}){{1,5}}|{_H}:(?::{_H}){{1,6}}|:(?::{_H}){{1,7}}|::|::[Ff]{{4}}:{_IPV4})"
)
_ESCAPED = r"%[0-9A-Fa-f]{2}"
_PCHAR = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|{_ESCAPED})"
_SEGMENT_WITHOUT_COLON = rf"(?:[A-Za-z0-9._~!$&'()*+,;=@-]|{_ESCAPED})+"
_AUTHORITY = rf"//(?:(?:[A-Za-z0-9._~!$&'()*+,;=:-]|{_ESCAPED})+@)?(?:{_HOST}|{_IPV4}|\[{_IPV6}\])(?::\d{{1,4}})?"
_ABSOLUTE_PATH = rf"/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_URI = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{_AUTHORITY}(?:/{_PCHAR}*)*|{_ABSOLUTE_PATH}|{_PCHAR}+(?:/{_PCHAR}*)*){_TAIL}"
_RELATIVE = rf"(?:{_AUTHORITY}(?:/{_PCHAR}*)*|{_ABSOLUTE_PATH}|{_SEGMENT_WITHOUT_COLON}(?:/{_PCHAR}*)*)?{_TAIL}"
_VARIABLE = rf"(?:[A-Za-z0-9_]|{_ESCAPED})(?:\.?(?:[A-Za-z0-9_]|{_ESCAPED}))*(?::[1-9]\d{{0,3}}|\*)?"
_POINTER = r"(?:/(?:[^/~]|~[01])*)*"

PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P(?:{_COUNT}W|{_DAYS}(?:{_CLOCK})?|{_CLOCK})",
    "email": rf"{_ATEXT}(?:\.?{_ATEXT}){{0,31}}@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}",
    "uri": _URI,
    "uri-reference": f"(?:{_URI}|{_RELATIVE})",
    "uri-template": rf"(?:[!#$&(-;=?-Z_a-z~\[\]]|{_ESCAPED}|\{{[+#./;?&]?{_VARIABLE}(?:,{_VARIABLE})*\}})*",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9]\d{{0,8}})(?:#|{_POINTER})",
}
# of the standard's; names that it has not are comments
UNENFORCED = ("idn-email", "idn-hostname", "iri", "iri-reference", "regex")
