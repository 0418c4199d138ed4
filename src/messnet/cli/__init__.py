"""The command: one verb per stage. Bad input ends in one line and exit code 2; heavy imports wait inside the verbs."""

from messnet.cli import data, deployment, evaluate, predict, profile, search, serve, stages
from messnet.cli.app import app, main

__all__ = ["app", "data", "deployment", "evaluate", "main", "predict", "profile", "search", "serve", "stages"]

for verb in app:
    app[verb].help_format = "markdown"
