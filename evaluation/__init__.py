"""How samples are judged: the classifier, the metrics, the result files and the plots."""
