"""The published documentation: a folder for each version, of which the newest is what one lands on.

    python scripts/site.py docs/_build/html SITE

writes ``SITE/1.2.0/``, ``SITE/versions.json`` (newest first, for the choice in the sidebar) and
``SITE/index.html``.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

LANDING = """<!doctype html>
<meta charset="utf-8">
<title>pyro-iw</title>
<meta http-equiv="refresh" content="0; url={version}/index.html">
<a href="{version}/index.html">pyro-iw {version}</a>
"""


def key(version: str) -> tuple[list[int], bool]:
    """Sorts versions by their numbers; what is no release (``1.2.0rc1``) comes before the release."""
    numbers = re.match(r"[\d.]+\d", version)
    return [int(part) for part in numbers[0].split(".")], numbers[0] == version


def built_version(html: Path) -> str:
    """The version that built pages say they are of."""
    text = (html / "objects.inv").read_bytes().split(b"\n", 3)[2].decode()
    return text.removeprefix("# Version: ").strip()


def publish(html: Path, site: Path) -> str:
    """Put the pages into the site and return their version."""
    version = built_version(html)
    target = site / version
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(html, target, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    versions = sorted((path.parent.name for path in site.glob("*/objects.inv")), key=key, reverse=True)
    (site / "versions.json").write_text(json.dumps(versions) + "\n")
    newest = next((name for name in versions if key(name)[1]), versions[0])
    (site / "index.html").write_text(LANDING.format(version=newest))
    return version


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("html", type=Path, help="the pages that make docs has built")
    parser.add_argument("site", type=Path, help="the folder to publish")
    args = parser.parse_args(argv)
    print(f"{args.site / publish(args.html, args.site)}")


if __name__ == "__main__":
    main()
