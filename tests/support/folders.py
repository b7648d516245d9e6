"""What lies in folders, to be compared before and after."""

from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    """Every file below the folder with its contents."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def entries(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in the folders, and they themselves, with times of change and contents."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b'')
        for folder in folders
        for path in (folder, *sorted(folder.rglob('*')))
    }
