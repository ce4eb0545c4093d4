"""fixmatch configs: the packaged recipes, and every key that a recipe may have."""

from fixmatch import config_docs
from fixmatch.cli import Parser
from fixmatch.config import recipes


def main(argv: list[str]) -> int:
    parser = Parser("configs", description="List the packaged recipes, which -c takes by name.")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--keys", action="store_true", help="every setting with its range and meaning, as Markdown")
    instead.add_argument("--schema", action="store_true", help="a JSON schema of configuration files, for editors")
    args = parser.parse_args(argv)
    if args.keys or args.schema:
        print(config_docs.page() if args.keys else config_docs.schema(), end="")
        return 0
    for name, path in recipes().items():
        print(f"{name:<24} {purpose(path.read_text(encoding='utf-8'))}")
    return 0


def purpose(recipe: str) -> str:
    """The first line of a recipe's header after the command."""
    lines = [line.removeprefix("#").strip() for line in recipe.splitlines() if line.startswith("#")]
    return next((line for line in lines[1:] if line), "")
