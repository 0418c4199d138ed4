"""The files in deploy/ fit the service: its options, paths, port, metrics, and the time that it takes to stop."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from helpers.serving import fake, running
from messnet.apps.serving.options import ServeOptions
from messnet.cli.app import app

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    _, service = fake()
    with running(service) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> dict[str, list[str]]:
    """The instructions of the image that runs, the last stage of the Dockerfile, by their names."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    for line in text.split("\nFROM ")[-1].splitlines()[1:]:
        name, _, rest = line.partition(" ")
        if name:
            found.setdefault(name, []).append(rest)
    return found


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def options_of(words: list[str]) -> ServeOptions:
    """Those of a `messnet serve`; raises for words that it does not take."""
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments.get("options", ServeOptions())


def seconds_to_stop(options: ServeOptions) -> float:
    return options.drain_s + options.timeout_s + 5


def test_the_image(image: dict[str, list[str]], client: httpx.Client) -> None:
    assert json.loads(image["ENTRYPOINT"][0]) == ["messnet"]
    options = options_of(json.loads(image["CMD"][0]))
    assert options.host == "0.0.0.0"
    assert image["EXPOSE"] == [str(options.port)]
    assert image["USER"][-1].split(":")[0].isdigit()
    assert image["USER"][-1].split(":")[0] != "0"
    assert image["STOPSIGNAL"] == ["SIGTERM"]
    probe = json.loads(image["HEALTHCHECK"][0].partition("CMD ")[2])
    port, path = re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", probe[-1])[0]
    assert int(port) == options.port
    assert client.get(path).status_code == 200
    compile(probe[-1], "probe", "exec")
    text = (DEPLOY / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((REPOSITORY / name).exists() for name in shlex.split(copied)), copied


def test_beside_prometheus(compose: Any, client: httpx.Client) -> None:
    service = compose["messnet"]
    options = options_of(service["command"])
    assert float(service["stop_grace_period"].removesuffix("s")) > seconds_to_stop(options)
    assert service["ports"] == [f"127.0.0.1:{options.port}:{options.port}"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for one in compose.values():
        assert all((DEPLOY / volume.split(":")[0]).exists() for volume in one["volumes"])
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert client.get(job["metrics_path"]).status_code == 200
    assert job["static_configs"] == [{"targets": [f"messnet:{options.port}"]}]


def test_in_a_cluster(cluster: dict[str, Any], client: httpx.Client) -> None:
    template = cluster["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    options = options_of(container["args"])
    (port,) = container["ports"]
    assert port["containerPort"] == options.port
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[name]["httpGet"]
        assert client.get(asked["path"]).status_code == 200
        assert asked["port"] == port["name"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert template["spec"]["terminationGracePeriodSeconds"] > before + seconds_to_stop(options)
    notes = template["metadata"]["annotations"]
    assert int(notes["prometheus.io/port"]) == options.port
    metrics = client.get(notes["prometheus.io/path"]).text
    scaler = cluster["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == cluster["Deployment"]["metadata"]["name"]
    (metric,) = scaler["metrics"]
    assert f"\n{metric['pods']['metric']['name']} " in metrics
    assert float(metric["pods"]["target"]["averageValue"]) < options.max_queue
    labels = template["metadata"]["labels"]
    selectors = [cluster["Deployment"]["spec"]["selector"], cluster["PodDisruptionBudget"]["spec"]["selector"]]
    assert all(one["matchLabels"].items() <= labels.items() for one in selectors)
    assert cluster["Service"]["spec"]["selector"].items() <= labels.items()
    assert cluster["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
