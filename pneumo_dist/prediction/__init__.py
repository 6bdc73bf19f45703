"""From weights to answers: the forward pass, validation scores, batch inference, files and reports for people."""
