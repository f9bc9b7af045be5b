"""What others have against a Grafana dashboard and the metrics that it shows.

    dashboard.py schema DASHBOARD     Grafana's own types of a dashboard, by its foundation SDK
    dashboard.py queries DASHBOARD    the queries' grammar, by promql_parser
    dashboard.py metrics FILE         OpenMetrics text, by prometheus_client

Each finding is a line; without any, the number of things looked at is. The exit status says which.
"""

import enum
import json
import sys
import typing


def lost(given, kept, path):
    """What reading by Grafana's types and writing again has lost or changed."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: there is no such field"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for at, (one, other) in enumerate(zip(given, kept)):
            yield from lost(one, other, f"{path}[{at}]")
    elif given != kept:
        yield f"{path}: {given!r} became {kept!r}"


def fits(value, hint):
    """Whether a value is of a type."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if hint in (typing.Any, object) or isinstance(hint, typing.TypeVar):
        return True
    if origin is typing.Union:
        return any(fits(value, one) for one in of)
    if origin is typing.Literal:
        return value in of
    if origin is list:
        return isinstance(value, list) and all(fits(one, of[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, of[1]) for one in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, hint) or value in [one.value for one in hint]
    return not isinstance(hint, type) or isinstance(value, hint)


def wrong(model, path, seen):
    """Fields of Grafana's objects that are not of their types."""
    if isinstance(model, (list, dict)):
        every = model.items() if isinstance(model, dict) else enumerate(model)
        for key, one in every:
            yield from wrong(one, f"{path}[{key}]", seen)
    elif type(model).__module__.startswith("grafana_foundation_sdk.models"):
        if isinstance(model, enum.Enum):
            return
        seen.append(model)
        for name, hint in typing.get_type_hints(type(model)).items():
            value = getattr(model, name)
            if not fits(value, hint):
                yield f"{path}.{name}: {value!r} is no {hint}"
            yield from wrong(value, f"{path}.{name}", seen)


def schema(text):
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    model = Dashboard.from_json(json.loads(text))
    kept = json.loads(encoder.JSONEncoder(sort_keys=True).encode(model))
    seen = []
    findings = [*lost(json.loads(text), kept, "$"), *wrong(model, "$", seen)]
    return findings, len(seen)


def queries(text):
    import promql_parser

    findings, count = [], 0
    for panel in json.loads(text)["panels"]:
        for target in panel.get("targets", []):
            count += 1
            try:
                promql_parser.parse(target["expr"].replace("$__rate_interval", "5m"))
            except ValueError as error:
                findings.append(f"{panel['title']}: {target['expr']}: {error}")
    return findings, count


def metrics(text):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        return [str(error)], 0
    return [], sum(one.type == "histogram" for one in families)


def main():
    check = {"schema": schema, "queries": queries, "metrics": metrics}[sys.argv[1]]
    with open(sys.argv[2], encoding="utf-8") as file:
        findings, count = check(file.read())
    print("\n".join(findings) if findings else count)
    sys.exit(bool(findings))


main()
