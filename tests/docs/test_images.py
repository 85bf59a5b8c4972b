"""Dockerfile and compose file, parsed: no Docker engine is needed to see that they name things that exist."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from typing import Any

import click
import pytest
import yaml

from readroom.cli import main
from tests.docs.markdown import ROOT
from tests.docs.test_configuration import COMPOSE_ONLY, EXAMPLE, known_variables, read_example

COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTION = re.compile(r"^(?P<word>[A-Z]+)\s+(?P<rest>.*)$")


def read_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined, comments dropped."""
    kept = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", kept)
    return [(m["word"], m["rest"]) for line in joined.splitlines() if (m := INSTRUCTION.match(line))]


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage name; a stage's own ones only."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for word, rest in read_instructions():
        if word == "FROM":
            stages[rest.split(" AS ")[1]] = []
        if stages:
            stages[next(reversed(stages))].append((word, rest))
    return stages


def find_command(words: list[str]) -> click.Command:
    """The click command of `readroom ...`; its options are checked by click's own parser."""
    assert words[0] == "readroom"
    command: click.Command = main
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest, resilient_parsing=True)
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known | {"--help"}
    return command


def test_services_are_the_ones_that_were_promised() -> None:
    assert set(SERVICES) >= {"valkey", "postgres", "migrate", "worker", "worker-cpu", "flower"}
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    assert len(OURS) >= 5


@pytest.mark.parametrize("name", OURS)
def test_service_runs_a_command_that_exists(name: str) -> None:
    assert find_command(OURS[name]["command"]) is not main


@pytest.mark.parametrize("name", OURS)
def test_service_sets_known_variables_only(name: str) -> None:
    variables = set(OURS[name]["environment"])
    assert variables
    assert variables <= known_variables()


def test_compose_asks_only_for_variables_the_example_explains() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE_TEXT))
    assert len(asked) >= 6
    assert asked <= set(read_example()), EXAMPLE
    assert set(read_example()) >= COMPOSE_ONLY


def test_secrets_have_no_default_and_stand_in_no_environment() -> None:
    for match in re.findall(r"\$\{([A-Z_]*PASSWORD)([^}]*)\}", COMPOSE_TEXT):
        assert match[1].startswith(":?"), match
    for name, service in SERVICES.items():
        values = json.dumps(service.get("environment", {}))
        assert "PASSWORD}" not in values and "PASSWORD:" not in values, name


@pytest.mark.parametrize("name", SERVICES)
def test_secret_and_config_files_are_declared_and_mounted_where_the_variables_point(name: str) -> None:
    service = SERVICES[name]
    mounted = {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}
    mounted |= {config["target"] for config in service.get("configs", [])}
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    assert {config["source"] for config in service.get("configs", [])} <= set(COMPOSE["configs"])
    pointed = {value for key, value in service.get("environment", {}).items() if key.endswith("_FILE")}
    assert pointed <= mounted


def test_only_flower_is_published_and_only_on_loopback() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"flower": ["127.0.0.1:5555:5555"]}
    assert COMPOSE["networks"]["backend"] == {"internal": True}


def test_flower_has_a_password_and_bounded_memory_and_keeps_no_file() -> None:
    flower = SERVICES["flower"]
    assert flower["environment"]["READROOM_FLOWER_PASSWORD_FILE"] == "/run/secrets/flower_password"
    assert flower["mem_limit"]
    assert flower["volumes"] == []
    options = (ROOT / "readroom" / "stack.py").read_text()
    assert "--max-tasks=" in options
    assert "--basic-auth=" in options
    assert "--persistent" not in options


def test_valkey_keeps_an_append_only_file_behind_a_password() -> None:
    settings = dict(line.split(" ", 1) for line in COMPOSE["configs"]["valkey_conf"]["content"].splitlines())
    assert settings["appendonly"] == "yes"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["requirepass"].startswith("${READROOM_BROKER_PASSWORD:?")
    assert SERVICES["valkey"]["volumes"] == ["valkey:/data"]
    assert SERVICES["valkey"]["command"][1] == SERVICES["valkey"]["configs"][0]["target"]


def test_gpu_worker_reserves_a_gpu_and_the_other_does_not() -> None:
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["worker-cpu"]


@pytest.mark.parametrize("name", OURS)
def test_service_runs_without_privileges(name: str) -> None:
    service = OURS[name]
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    binds = [volume for volume in service["volumes"] if isinstance(volume, dict)]
    assert all(volume["read_only"] for volume in binds)


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_restarted_and_checked(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == {"migrate": "on-failure:5", "cli": "no"}.get(name, "unless-stopped")
    assert ("healthcheck" in service) == (name in {"valkey", "postgres", "flower"})
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", OURS)
def test_service_waits_for_what_it_needs(name: str) -> None:
    needs = OURS[name]["depends_on"]
    assert set(needs) <= set(SERVICES)
    for needed, condition in needs.items():
        healthy = condition["condition"] == "service_healthy"
        assert healthy == ("healthcheck" in SERVICES[needed])


@pytest.mark.parametrize("name", ["worker", "worker-cpu"])
def test_worker_has_time_to_finish_its_batch(name: str) -> None:
    assert SERVICES[name]["stop_grace_period"] == "2m"


def test_every_build_target_is_a_stage() -> None:
    stages = read_stages()
    targets = {service["build"]["target"] for service in OURS.values()}
    assert targets == {"light", "gpu", "cpu"}
    assert targets <= set(stages)


@pytest.mark.parametrize("stage", ["light", "gpu", "cpu"])
def test_image_runs_as_its_own_user_with_a_command_that_exists(stage: str) -> None:
    instructions = read_stages()[stage]
    assert ("USER", "readroom") in instructions
    command = json.loads(next(rest for word, rest in instructions if word == "CMD"))
    find_command(command)


def test_light_image_has_no_torch() -> None:
    installs = " ".join(rest for word, rest in read_stages()["build-light"] if word == "RUN")
    assert "models" not in installs
    assert "torch" not in installs


@pytest.mark.parametrize("stage", ["build-light", "build-gpu", "build-cpu"])
def test_image_installs_the_pinned_versions(stage: str) -> None:
    installs = " ".join(rest for word, rest in read_stages()[stage] if word == "RUN")
    assert installs.count("pip install") == installs.count("--constraint constraints.txt") == 2


def test_image_variables_are_known_settings() -> None:
    assigned = set(re.findall(r"\b(READROOM_[A-Z_]+)=", DOCKERFILE))
    assert assigned
    assert assigned <= known_variables()
    assert not re.search(r"PASSWORD|SECRET|TOKEN", DOCKERFILE)


def test_copied_paths_exist_and_are_sent_to_the_builder() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert len(allowed) >= 10
    assert [name for name in allowed if not (ROOT / name).exists()] == []
    copied = [
        path for w, rest in read_instructions() if w == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    ]
    assert copied
    assert [path for path in copied if path != "." and not any(fnmatch(path, name) for name in allowed)] == []


def test_image_holds_every_package_of_the_project() -> None:
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = next(rest for word, rest in read_stages()["build"] if word == "RUN").split("&&")[0]
    made = [folder.replace("/", ".") for folder in folders.removeprefix("mkdir -p ").split()]
    assert {package for package in packages if not any(name.startswith(package) for name in made)} == set()
