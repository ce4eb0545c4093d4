"""What pyproject.toml cannot say: the recipes lie in configs/, and become fixmatch/configs of an installed package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fixmatch*", "parity*"]), "fixmatch.configs"],
    package_dir={"fixmatch.configs": "configs"},
    package_data={"fixmatch": ["**/*"], "fixmatch.configs": ["*"], "parity": ["**/*"]},
    exclude_package_data={"": ["__pycache__/*", "**/__pycache__/*"]},
)
