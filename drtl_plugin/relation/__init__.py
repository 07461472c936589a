"""The functional core of the relation: graph, weights, estimators. It knows no option dict."""
