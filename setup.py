"""Packaging: the folders ``moecompile``, ``passes`` and ``codegen`` are one package, ``moecompile``."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def version() -> str:
    for line in (HERE / "moecompile" / "version.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("moecompile/version.py names no version")


setup(
    name="moecompile",
    version=version(),
    description="Turn a dense transformer into a Mixture-of-Experts and make it run fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "moecompile",
        "moecompile.cli",
        "moecompile.codegen",
        "moecompile.match",
        "moecompile.passes",
        "moecompile.recipes",
        "moecompile.report",
        "moecompile.tuning",
    ],
    package_dir={
        "moecompile": "moecompile",
        "moecompile.passes": "passes",
        "moecompile.codegen": "codegen",
    },
    package_data={
        "moecompile": ["py.typed"],
        "moecompile.report": ["*.jinja", "*.css"],
        "moecompile.codegen": ["templates/*.jinja"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=5.17,<5.24",
        "safetensors>=0.4.3",
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "scipy>=1.11",
        "jinja2>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "gguf": ["gguf>=0.10", "accelerate>=1.0"],
        "test": [
            "gguf>=0.10",
            "accelerate>=1.0",
            # Compiles for every target without a GPU; torch's CUDA build brings the same package.
            "triton>=3.7,<3.10; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "build>=1.2",
        ],
    },
    entry_points={
        "console_scripts": ["moecompile=moecompile.cli:main"],
        "torch_dynamo_backends": ["moecompile=moecompile.backend:backend"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
