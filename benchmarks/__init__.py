"""The project's own measurements: which shapes, where the results lie, how to compare them.

The measuring itself is `fastlora.cli.bench`, so that `fastlora bench` of an installed package and
these figures are made by the same code.
"""
