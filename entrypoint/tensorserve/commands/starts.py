"""Which commands start something?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from tensorserve.errors import UsageError
from tensorserve.linux import end_with_parent


def run_up(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.launch.supervisor import up

    return up(environ, options.arguments)


def run_serve(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.launch.serve import serve

    serve(environ, options.arguments)


def run_exporter(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    end_with_parent()
    from tensorserve.launch.companions import COMPANIONS_VARIABLE, receive_companions
    from tensorserve.telemetry.exporter import serve_exporter

    found = receive_companions(left_by_up(environ, COMPANIONS_VARIABLE))
    serve_exporter(found.state_dir, found.metrics_host, found.metrics_port)
    return 0


def run_watch(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    end_with_parent()
    from tensorserve.launch.companions import COMPANIONS_VARIABLE
    from tensorserve.launch.supervisor import watch

    watch(left_by_up(environ, COMPANIONS_VARIABLE))
    return 0


def left_by_up(environ: Mapping[str, str], variable: str) -> str:
    if variable not in environ:
        raise UsageError("Only `tensorserve up` runs this command.", hint="Run `tensorserve up`.")
    return environ[variable]
