"""config.json of published models, by name: what `--model glm-5` means where there is no such directory."""
