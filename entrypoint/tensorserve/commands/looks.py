"""Which commands look at a start: what it would be, whether it can be, how it is, how it was?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tensorserve.commands.terminal import warn
from tensorserve.config.tidying import has_controls, tidied
from tensorserve.errors import ConfigurationError


def run_plan(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.launch_plan import describe, make_plan
    from tensorserve.config.settings import Settings

    settings = Settings.from_environment(environ)
    warn(*settings.warnings)
    description = describe(make_plan(settings, options.arguments), settings)
    if options.json:
        print(json.dumps(description, indent=2))
        return 0
    for title, content in description.items():
        print(title.replace("_", " "))
        if isinstance(content, dict):
            for name, value in content.items():
                print(f"  {name:34} {value}")
        elif isinstance(content, list):
            print(
                f"  {' '.join(content)}"
                if title == "command"
                else "\n".join(f"  {c}" for c in content)
            )
        else:
            print(f"  {content}")
    return 0


def run_check(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.launch_plan import make_plan
    from tensorserve.config.settings import Settings
    from tensorserve.launch.completeness import check_files
    from tensorserve.launch.preflight import Passed, check_adapters, run_checks
    from tensorserve.telemetry.names import Check

    width = max(map(len, Check))
    settings = Settings.from_environment(environ)
    warn(*settings.warnings)
    plan = make_plan(settings, options.arguments)

    def report(passed: Passed) -> None:
        print(f"ok  {passed.name:{width}} {passed.found}", flush=True)

    checked = run_checks(settings, plan, report)
    for passed in check_files(checked.settings, plan, checked):
        report(passed)
    if (found := check_adapters(checked.settings)) is not None:
        report(found[0])
        warn(*found[1])
    if checked.weights.warning is not None:
        warn(checked.weights.warning)
    print("Everything that a start needs is there.")
    return 0


def run_health(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import http.client

    from tensorserve.config.settings import metrics_address

    host, port = metrics_address(environ)
    host = "localhost" if host in {"0.0.0.0", "::"} else host
    connection = http.client.HTTPConnection(host, port, timeout=4)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.read(4096).decode(errors="replace").strip())
        return int(response.status != 200)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host name
        print(f"no answer on port {port}: {error}")
        return 1
    finally:
        connection.close()


def run_report(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import shutil

    from tensorserve.config.variables import default_state_dir
    from tensorserve.telemetry import events_path, fold, read_events
    from tensorserve.telemetry.report import render_report, report_json

    environ = tidied(environ)
    directory = Path(environ.get("TENSORSERVE_STATE_DIR") or default_state_dir(environ))
    if has_controls(str(directory)):
        raise ConfigurationError("TENSORSERVE_STATE_DIR has a line break or such in it.")
    try:
        events = read_events(events_path(directory))
    except OSError as error:
        raise ConfigurationError(
            f"{str(events_path(directory))[:200]} cannot be read: {error.strerror}.",
            hint="Set TENSORSERVE_STATE_DIR to the state directory of the start.",
        ) from error
    if not events:
        raise ConfigurationError(
            f"There is no start to report: {events_path(directory)} is missing or empty.",
            hint="Set TENSORSERVE_STATE_DIR to the state directory of the start.",
        )
    state = fold(events)
    if options.json:
        print(json.dumps(report_json(state), indent=2))
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in environ
        print(render_report(state, shutil.get_terminal_size().columns, color))
    return 0
