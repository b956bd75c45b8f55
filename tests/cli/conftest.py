import pytest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    # Skips where the extra "serve" is not installed.
    from served import served_models

    return served_models(tmp_path_factory.mktemp("serve"))
