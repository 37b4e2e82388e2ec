"""The other faces of a node: OpenAI API, REST facade, status page."""
