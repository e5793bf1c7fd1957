"""Several servers as one: `paged openai --url A --url B`.

Start with cluster_client.py, which the gateway asks as it would ask one server. servers.py knows who is there,
routing.py chooses, resuming.py goes on elsewhere when a server dies under an answer.
"""
