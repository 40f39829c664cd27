"""Push adapters to the Hub and pull them back, whole or not at all.

huggingface_hub does the transfer. Added here: nothing that does not read as an adapter is sent or kept, bytes are
compared with the hashes that the Hub names, broken connections are tried again, and no sentence holds a token.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

from inlay.adapters.card import address_card
from inlay.adapters.file import CARD, CONFIG, METRICS, ORIGIN, WEIGHTS, expand_path, read_adapter
from inlay.adapters.hub.exchange import TOKEN, check_name, retry_exchange
from inlay.adapters.hub.index import INDEX, check_index, find_adapters, render_index, write_index
from inlay.adapters.weight_file import PIPELINE_WEIGHTS
from inlay.errors import BadInput, DamagedFile, Unreachable
from inlay.files.atomic import write_json, writing
from inlay.files.outputs import check_output_folder

# Of an adapter; nothing else is sent or fetched, so never a pickle.
FILES = (CONFIG, WEIGHTS, PIPELINE_WEIGHTS, METRICS, CARD, "*.png")
_COLLECTION = "---\nlibrary_name: peft\ntags:\n- inlay\n---\n\n"


@dataclass(frozen=True)
class Sent:
    """A file of a push: its path in the repository, its size and its SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Push:
    """What was sent, or in a dry run would be.

    Attributes:
        repo: user/name.
        files: All of them, also those that the Hub had already.
        commit: The commit that holds them; None in a dry run.
        url: Of the repository.
        warnings: What others could not use, though it is whole.
    """

    repo: str
    files: list[Sent]
    commit: str | None
    url: str
    warnings: list[str]

    def __str__(self) -> str:
        wide = max(len(file.path) for file in self.files)
        lines = [f"{file.path:<{wide}}  {file.bytes:>12,} bytes  sha256 {file.sha256}" for file in self.files]
        total = f"{len(self.files)} files, {sum(file.bytes for file in self.files):,} bytes"
        said = f"dry run: {total} would go to {self.repo}" if self.commit is None else f"{total} in {self.url}"
        at = [f"commit {self.commit}"] if self.commit else []
        return "\n".join([*lines, *(f"note: {text}" for text in self.warnings), said, *at])


@dataclass(frozen=True)
class Pulled:
    """A folder, and the commit of the repository that it is a copy of."""

    folder: Path
    repo: str
    commit: str


def push_adapter(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> Push:
    """Send an adapter, or a folder of adapters, to the Hub as one commit; a repository that is not there is made.

    Sent are the config, the weights, the metrics, the plots and the card, in which the repository's name takes the
    place of FOLDER; nothing else that lies in the folder. A folder of adapters goes with its index. Pushed again,
    unchanged files cost nothing, and what a broken connection has brought over already is not sent twice.

    Args:
        folder: Of an adapter, or of folders of adapters; each is read and checked first.
        repo: user/name or organisation/name.
        private: Make the repository private; one that is public already is refused.
        license: Of the adapter, for its card, such as apache-2.0; default: what the card says.
        dry_run: Say what would be sent; nothing is, and no connection is made.
        token: With the right to write; default: the one of `hf auth login` or HF_TOKEN.

    Raises:
        InlayError: What `read_adapter` finds; a token inside a file; a repository that holds something else; no token,
            no right, no connection.
    """
    check_name(repo)
    folder = expand_path(folder)
    contents, warnings = _contents(folder, repo, license)
    files = [Sent(path, *_size_and_hash(content)) for path, content in contents.items()]
    api = HfApi(token=token)
    url = f"{api.endpoint}/{repo}"
    if dry_run:
        return Push(repo, files, None, url, warnings)
    message = f"Push {folder.resolve().name} with inlay"
    commit = retry_exchange(lambda: _commit(api, repo, contents, files, private, message), repo, token)
    return Push(repo, files, commit, url, warnings)


def check_push(repo: str, token: str | None = None) -> None:
    """Raise InlayError now for what would make a push fail later: a bad name, no connection, no token or no right."""
    check_name(repo)
    me = retry_exchange(lambda: HfApi(token=token).whoami(), repo, token)
    names = [me["name"], *(group["name"] for group in me.get("orgs", []))]
    if repo.partition("/")[0] not in names:
        raise Unreachable(
            f"this token may write to {', '.join(names)}, not to {repo}; take another name, or its token."
        )
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise Unreachable(f"this token may only read, and {repo} is to be written; take one with the right to write.")


def pull_adapter(repo: str, folder: str | Path | None = None, *, revision: str | None = None) -> Pulled:
    """Copy an adapter, or a folder of adapters, from the Hub or its cache, and note the commit in origin.json.

    An adapter that is there is replaced in one step; next to those of a folder of adapters others stay as they are.

    Args:
        repo: user/name.
        folder: Where; default: the repository's name.
        revision: Branch, tag or commit; default: main.

    Raises:
        InlayError: As `download` and `read_adapter`; a folder that holds something else.
    """
    check_name(repo)
    folder = check_output_folder(expand_path(folder or repo.rpartition("/")[2]))
    snapshot = download(repo, revision)
    single = (snapshot / CONFIG).is_file()
    if not single:
        snapshot = download(repo, snapshot.name, "*")
    copies = {path: folder if single else folder / path.name for path in find_adapters(snapshot)}
    for path, copy in copies.items():
        read_adapter(path)
        if copy.exists() and (not copy.is_dir() or any(copy.iterdir())) and not (copy / CONFIG).is_file():
            raise BadInput(f"{copy} exists and is not an adapter; give another folder.")
    if not single:
        check_index(folder)
    for path, copy in copies.items():
        origin = {"repo": repo, "revision": revision or "main", "commit": snapshot.name}
        with writing(copy) as new:
            for file in _files_of(path):
                shutil.copyfile(file, new / file.name)
            hashes = {file.name: _size_and_hash(file)[1] for file in _files_of(new)}
            write_json(new / ORIGIN, {**origin, "sha256": hashes})
            read_adapter(new)
    if not single:
        write_index(folder)
    return Pulled(folder, repo, snapshot.name)


def download(repo: str, revision: str | None = None, inside: str = "") -> Path:
    """The files of an adapter in the Hub's cache, compared with the hashes that the Hub names for them.

    Without a connection or with HF_HUB_OFFLINE=1 it is what the cache has.

    Args:
        repo: user/name.
        revision: Branch, tag or commit; default: main.
        inside: Folder in the repository: of one adapter among several, or * for all of them.

    Returns:
        The folder, whose name is the commit; of an adapter `inside` that one's.

    Raises:
        InlayError: No such repository or revision, no right, no connection and nothing in the cache; other bytes than
            the Hub names.
    """
    if revision is not None and (not revision.strip() or ".." in revision):  # no name of git's, and a path in the cache
        raise BadInput(f"{revision!r} is no branch, tag or commit of {repo}; leave it out for main.")
    wanted = [f"{inside}/{name}" for name in FILES] if inside else list(FILES)

    def get() -> Path:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*/*"] if inside else ["*/*"]
            )
        )
        wrong = [path for pattern in wanted for path in folder.glob(pattern) if not _as_named(path)]
        for path in wrong:  # else the cache would give them again
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        if wrong:
            raise ConnectionError(f"the bytes of {wrong[0].name} are not those that the Hub names")
        return folder

    folder = retry_exchange(get, repo, None)
    return folder if inside in ("", "*") else folder / inside


def _contents(folder: Path, repo: str, licence: str | None) -> tuple[dict[str, bytes | Path], list[str]]:
    """What is sent, by its path in the repository, and what to note about it."""
    contents: dict[str, bytes | Path] = {}
    warnings: list[str] = []
    single = (folder / CONFIG).is_file()
    adapters = find_adapters(folder)
    for path in adapters:
        file = read_adapter(path)
        inside = "" if single else f"{path.name}/"
        contents |= {inside + part.name: part for part in _files_of(path)}
        if (path / CARD).is_file():
            try:
                text = (path / CARD).read_text(encoding="utf-8")
            except ValueError:
                raise DamagedFile(
                    f"{path / CARD} is not valid UTF-8; save the adapter again, or leave it out."
                ) from None
            contents[inside + CARD] = address_card(text, repo, inside.rstrip("/"), licence).encode()
        else:
            warnings.append(f"{path.name} has no {CARD}, so its page will be empty")
        if file.base_name and _is_here(file.base_name):
            warnings.append(f"{path.name} has the local folder {file.base_name!r} as its base, which others lack")
    if not single:
        texts = render_index(folder)
        contents |= {name: text.encode() for name, text in texts.items()}
        contents[CARD] = (_COLLECTION + texts[CARD]).encode()
    for path_in_repo, content in contents.items():
        if not path_in_repo.endswith((".safetensors", ".png")):
            data = content if isinstance(content, bytes) else content.read_bytes()
            if TOKEN.search(data):
                raise BadInput(f"{path_in_repo} holds what looks like a Hub token; take it out, and revoke it.")
    return contents, warnings


def _is_here(name: str) -> bool:
    try:
        return expand_path(name).exists()
    except (OSError, ValueError):  # too long for a path, or no path at all
        return False


def _files_of(adapter: Path) -> list[Path]:
    return [path for pattern in FILES for path in sorted(adapter.glob(pattern)) if path.is_file()]


def _commit(
    api: HfApi, repo: str, contents: dict[str, bytes | Path], files: list[Sent], private: bool, message: str
) -> str:
    """One commit of all files, on top of what is there now; its hash, once the Hub is seen to have them."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    info = api.model_info(repo)
    if private and not info.private:
        raise BadInput(f"{repo} is public already, but private was asked for: change it on the Hub, or name another.")
    there = {sibling.rfilename for sibling in info.siblings or []} - {".gitattributes", CARD}
    kind = "an adapter" if CONFIG in contents else "a folder of adapters"
    if there and (CONFIG if CONFIG in contents else INDEX) not in there:
        raise BadInput(f"{repo} holds {min(there)} and more, not {kind}; name another repository.")
    # Fresh operations each time: from the Hub's answers about them a repeated push knows what has arrived.
    operations = [CommitOperationAdd(path, str(c) if isinstance(c, Path) else c) for path, c in contents.items()]
    made = api.create_commit(repo, operations, commit_message=message, parent_commit=info.sha)
    wanted = {file.path: file.sha256 for file in files}
    found = api.get_paths_info(repo, list(wanted), revision=made.oid)
    arrived = {entry.path: entry for entry in found}
    for operation in operations:
        entry: Any = arrived.get(operation.path_in_repo)
        named = entry and (entry.lfs.sha256 if entry.lfs else entry.blob_id)
        if named not in (wanted[operation.path_in_repo], _git_hash(contents[operation.path_in_repo])):
            raise ConnectionError(f"the Hub does not have the bytes of {operation.path_in_repo} that were sent")
    return made.oid


def _as_named(path: Path) -> bool:
    """Whether a file in the cache has the content that its name there, the Hub's hash, stands for.

    Where the cache has no links (Windows, as a rule) its names say nothing; the adapter's own checksum remains.
    """
    named = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", named):
        return _size_and_hash(path)[1] == named
    return not re.fullmatch("[0-9a-f]{40}", named) or _git_hash(path) == named


def _size_and_hash(content: bytes | Path) -> tuple[int, str]:
    if isinstance(content, bytes):
        return len(content), hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return content.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(content: bytes | Path) -> str:
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
