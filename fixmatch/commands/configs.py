"""fixmatch configs: the packaged recipes."""

from fixmatch.cli import Parser
from fixmatch.config import recipes


def main(argv: list[str]) -> int:
    Parser("configs", description="List the packaged recipes, which -c takes by name.").parse_args(argv)
    for name, path in recipes().items():
        print(f"{name:<24} {purpose(path.read_text(encoding='utf-8'))}")
    return 0


def purpose(recipe: str) -> str:
    """The first line of a recipe's header after the command."""
    lines = [line.removeprefix("#").strip() for line in recipe.splitlines() if line.startswith("#")]
    return next((line for line in lines[1:] if line), "")
