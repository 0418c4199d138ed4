"""The command: one verb per stage. Bad input ends in one line and exit code 2; heavy imports wait inside the verbs."""

from messnet.cli import data, deployment, profile, search, stages
from messnet.cli.app import app, main

__all__ = ["app", "data", "deployment", "main", "profile", "search", "stages"]
