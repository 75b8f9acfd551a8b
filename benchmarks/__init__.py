"""The project's own measurements: its shapes, its results, and programs that compare them.

They measure with the code of `fastlora bench`, `fastlora.cli.bench`.
"""
