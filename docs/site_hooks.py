"""What the site needs beside its pages: all of them in its navigation, and links out of this folder as plain names."""

import posixpath
import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config):
    """Put pages that the navigation does not name at its end, so that a new page is never lost."""
    root = Path(config["docs_dir"])
    named = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    others = sorted({path.relative_to(root).as_posix() for path in root.rglob("*.md")} - named)
    if others:
        config["nav"] = [*config["nav"], {"More": others}]
    return config


def on_page_markdown(markdown, page, config, files):
    """Turn a link to a file or folder of the repository that is no part of the site into its name.

    A link to nothing at all stays as it is, for the strict build to find.
    """
    here = posixpath.dirname(page.file.src_uri)
    root = Path(config["docs_dir"])

    def plain(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        if files.get_file_from_path(target) is not None or not (root / target).exists():
            return match[0]
        inside = not target.startswith("..")
        name = f"docs/{target}" if inside else target.lstrip("./")
        return f"{match[1]} (`{name}`)" if match[1].strip("`") != name else match[1]

    return LINK.sub(plain, markdown)
