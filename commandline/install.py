"""What pip and uv find where they are told to build this folder: a refusal in one sentence (see pyproject.toml).

The two names that every build asks for; the rest of a build backend (PEP 517) is optional.
"""

SENTENCE = ('nanokron is run from its folder and not installed: `bash run.sh config/kron_mlp.py` or `uv sync` makes .venv '
            'with the packages that it needs')


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """pip install ."""
    raise SystemExit(SENTENCE)


def build_sdist(sdist_directory, config_settings=None):
    """python -m build."""
    raise SystemExit(SENTENCE)


# pip install -e .
build_editable = prepare_metadata_for_build_wheel = prepare_metadata_for_build_editable = build_wheel
