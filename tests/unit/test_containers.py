"""What stands in the images and in compose.yaml is what the programs know.

No container engine is needed: the names are compared with the table of settings, the commands with
those that are installed.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.settings import read as read_coordinator
from ollama_coordinator_agent.settings import read as read_agent
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.settings import AgentConfig, Config, CoordinatorConfig

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PROGRAMS: dict[str, type[Config]] = {"coordinator": CoordinatorConfig, "agent": AgentConfig}


def dockerfile(package: str) -> dict[str, str]:
    """The instructions of the final stage; of several alike the last one."""
    text = (ROOT / "packages" / package / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    final = text.rpartition("\nFROM ")[2]
    found = re.findall(r"^([A-Z]+)\s+(.*)$", final, re.MULTILINE)
    return {name: value.strip() for name, value in found}


def environment(package: str) -> dict[str, str]:
    """What the image sets of the settings, by variable."""
    pairs = (word.partition("=") for word in shlex.split(dockerfile(package)["ENV"]))
    return {name: value for name, _, value in pairs if name not in ("PATH", "PYTHONUNBUFFERED")}


def compose() -> Any:
    return yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))


def variables(config: type[Config]) -> dict[str, str]:
    return {setting.variable: setting.name for setting in config.settings()}


@pytest.mark.spec("OPERATION-80")
@pytest.mark.parametrize("package", PROGRAMS)
def test_an_image_sets_what_the_program_takes_and_runs_as_nobody_special(package: str) -> None:
    known, given = variables(PROGRAMS[package]), environment(package)
    read = read_coordinator if package == "coordinator" else read_agent
    config = read({known[variable]: value for variable, value in given.items()})
    built = dockerfile(package)
    assert built["USER"] == "10001"
    assert built["VOLUME"] == built["WORKDIR"] == "/data"
    command = {"coordinator": "ollama-coordinator", "agent": "ollama-coordinator-agent"}[package]
    assert json.loads(built["ENTRYPOINT"]) == [command]
    if isinstance(config, CoordinatorConfig):
        assert config.access == "keys"
        assert str(config.key_file) == "/data/key"
        assert config.database_url == "sqlite:////data/coordinator.db"
        assert built["EXPOSE"] == str(config.port)
    else:
        assert isinstance(config, AgentConfig)
        assert not config.manage_ollama
        assert str(config.state_dir).startswith("/data/")


@pytest.mark.spec("OPERATION-80")
def test_the_health_checks_ask_what_is_there() -> None:
    words = json.loads(dockerfile("coordinator")["HEALTHCHECK"].partition(" CMD ")[2])
    assert words[:2] == ["python3", "-c"]
    compile(words[2], "health check", "exec")
    assert "/healthz" in words[2]
    words = json.loads(dockerfile("agent")["HEALTHCHECK"].partition(" CMD ")[2])
    assert words == ["ollama-coordinator-agent", "status"]


@pytest.mark.spec("OPERATION-80")
def test_what_an_image_installs_exists() -> None:
    for package in PROGRAMS:
        text = (ROOT / "packages" / package / "Dockerfile").read_text("utf-8")
        assert f"/src/{package}" in text
        project = (ROOT / "packages" / package / "pyproject.toml").read_text("utf-8")
        for extra in re.findall(r"/src/\w+\[([\w,]+)\]", text):
            assert all(f"\n{name} = [" in project for name in extra.split(","))
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[1:3] == ["*", "!packages"]
    assert (ROOT / "packages" / "constraints.txt").exists()


@pytest.mark.spec("OPERATION-80")
def test_compose_names_what_there_is() -> None:
    services = compose()["services"]
    assert set(services) == {"secrets", "coordinator", "ollama", "agent", "postgres"}
    for package, config in PROGRAMS.items():
        service = services[package]
        assert service["build"]["dockerfile"] == f"packages/{package}/Dockerfile"
        given = set(service["environment"])
        exported = set(re.findall(r"export (\w+)=", service["command"][0]))
        assert given | exported <= variables(config).keys() | {"POSTGRES_PASSWORD"}
        assert (
            service["command"][0].splitlines()[-1]
            == "exec " + json.loads(dockerfile(package)["ENTRYPOINT"])[0]
        )
    for service in services.values():
        volumes = [volume.partition(":")[0] for volume in service.get("volumes", ())]
        assert set(volumes) <= compose()["volumes"].keys()
        assert set(service.get("depends_on", ())) <= services.keys()
    # Everything but the database comes up by itself; the agent is beside its Ollama.
    assert [name for name, one in services.items() if "profiles" in one] == ["postgres"]
    assert services["coordinator"]["depends_on"]["postgres"]["required"] is False
    assert services["agent"]["network_mode"] == "service:ollama"
    # A health check sees nothing of what the command exports.
    check = services["agent"]["healthcheck"]["test"]
    assert check[0] == "CMD-SHELL"
    assert re.findall(r"(\w+)=", check[1]) == ["AGENT_JOIN_TOKEN"]
    assert check[1].endswith(" exec ollama-coordinator-agent status")
    port = CoordinatorConfig().port
    assert services["agent"]["environment"]["COORDINATOR_URL"] == f"http://coordinator:{port}"


@pytest.mark.spec("OPERATION-80")
@pytest.mark.skipif(sys.platform == "win32", reason="no sh")
def test_the_join_token_that_compose_makes_is_one(tmp_path: Path) -> None:
    service = compose()["services"]["secrets"]
    script = service["command"][0].replace("$$", "$")
    assert service["volumes"] == ["join:/join"]
    script = script.replace("/join/", f"{tmp_path}/")
    made = []
    for _ in range(2):  # the second start makes no other
        subprocess.run(["sh", "-ec", script], check=True)
        made.append(JoinToken.parse((tmp_path / "token").read_text()).secret)
    assert made[0] == made[1]
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


@pytest.mark.spec("OPERATION-80")
def test_the_kubernetes_manifest_has_what_the_program_takes() -> None:
    text = (ROOT / "packages" / "coordinator" / "kubernetes.yaml").read_text("utf-8")
    deployment, service = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    given = {one["name"]: one.get("value", "") for one in container["env"]}
    assert given.keys() - {"POD_IP"} <= variables(CoordinatorConfig).keys()
    assert pod["terminationGracePeriodSeconds"] > CoordinatorConfig().drain_timeout
    assert pod["securityContext"]["runAsUser"] == int(dockerfile("coordinator")["USER"])
    [port] = container["ports"]
    assert port["containerPort"] == CoordinatorConfig().port
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
