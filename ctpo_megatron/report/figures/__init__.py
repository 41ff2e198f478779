"""One figure a function: numbers in, a chart out, which is the same on the page and as a PNG."""
