"""Packaging of swan-video. cache/, configs/ and distributed/ travel inside `wan`: nothing else is at top level."""

from pathlib import Path

from setuptools import find_packages, setup

REPO = Path(__file__).parent
VERSION = next(line for line in (REPO / "wan/__init__.py").read_text().splitlines() if "__version__" in line)
SERVE = [
    *("fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus_client>=0.20"),
    *("httptools>=0.6", "uvloop>=0.19; sys_platform != 'win32'"),  # a request takes half as long
]

setup(
    name="swan-video",
    version=VERSION.split('"')[1],
    description="Inference for the Wan 2.1 and 2.2 video diffusion models",
    long_description=(REPO / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["wan", "wan.*"]),
        *(f"wan.{name}" for name in find_packages(include=["cache", "cache.*", "distributed", "distributed.*"])),
        "wan.configs",
    ],
    package_dir={f"wan.{folder}": folder for folder in ("cache", "configs", "distributed")},
    package_data={
        "wan": [
            *("assets/**/*", "quant/*.c", "quant/products.json", "models/attention.c"),
            *("serve/web/page.css", "serve/web/page.js"),
        ],
        "wan.cache": ["data/*.json"],
        "wan.configs": ["**/*.yaml"],
    },
    entry_points={"console_scripts": ["swan-generate=wan.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=4.51",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.30",
        "accelerate>=1.1",
        "sentencepiece>=0.2",
        "gguf>=0.17",
        "libgguf>=0.2.2",
        "ftfy>=6.2",
        "regex>=2024.5",
        "numpy>=1.26",
        "pillow>=10.3",
        "opencv-python-headless>=4.9",
        "imageio>=2.34",
        "imageio-ffmpeg>=0.5",
        "av>=12",
        "easydict>=1.13",
        "psutil>=5.9",
        "pyyaml>=6",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": ["pytest>=8", "ruff>=0.9", "diffusers>=0.35", "matplotlib>=3.8"],
        "serve": SERVE,
        "web": [*SERVE, "gradio>=6.31,<7"],
        "ray": ["ray>=2.52"],
        "plots": ["matplotlib>=3.8"],
        "flash": ["flash-attn>=2.5"],
    },
)
