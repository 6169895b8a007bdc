"""Compiles the operators into a folder: python -m engine.custom_ops FOLDER, for `compile_to`.

Runs the build itself, because cpp_extension.load runs it by a shell command that breaks at a space in a path.
"""
import os
import sys

from paddle.utils.cpp_extension import BuildExtension, CppExtension, setup

from engine.custom_ops import FLAGS, SOURCES

folder = os.path.abspath(sys.argv[1])
os.chdir(folder)
sys.argv[1:] = ['build']
setup(name='darts_ops',
      ext_modules=CppExtension(sources=SOURCES, extra_compile_args={'cxx': FLAGS}, extra_link_args=['-fopenmp']),
      cmdclass={'build_ext': BuildExtension.with_options(output_dir=folder, no_python_abi_suffix=True)})
