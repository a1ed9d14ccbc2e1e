"""nginx with `least_conn`, one process.

It does not read bodies. A machine that has not got the model answers 404, and nginx then asks the
next one: the kindest set-up for machines with unlike disks.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.traffic.clients import Target
from benchmarks.traffic.fleet import RunningFleet
from support import programs

from .base import Peer

CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    client_body_buffer_size 1m;
    upstream machines {{
        least_conn;
        {servers}
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{port};
        location = /peer-is-up {{ return 200; }}
        location / {{
            proxy_pass http://machines;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host localhost;
            proxy_buffering off;
            proxy_read_timeout 1h;
            proxy_next_upstream error timeout http_404 non_idempotent;
        }}
    }}
}}
"""


@asynccontextmanager
async def serving(executable: str, folder: Path, fleet: RunningFleet) -> AsyncIterator[Target]:
    """Run nginx during the block."""
    port = programs.free_port()
    servers = [machine.url.removeprefix("http://") for machine in fleet.machines]
    text = CONFIGURATION.format(
        folder=folder.as_posix(),
        port=port,
        servers=" ".join(f"server {server} max_fails=0;" for server in servers),
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(text, encoding="utf-8")
    command = (executable, "-p", str(folder), "-c", str(configuration))
    async with programs.program(folder / "nginx.log", *command) as running:
        url = f"http://127.0.0.1:{port}"
        await programs.answers(f"{url}/peer-is-up", running)
        yield Target(url)


PEER = Peer("nginx", "nginx", "Debian's nginx-light", serving)
