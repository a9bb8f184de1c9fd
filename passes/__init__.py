"""Graph passes: the pattern engine, the pipelines and the pass families. Knows no backend."""
