"""Generation: the generator, chat, requests and answers."""
