"""Plain PyTorch on any of its devices (`torch`, `torch:cuda:1`): the base of every chip whose vendor ships a PyTorch."""

requires = ("torch",)
rank = 10
