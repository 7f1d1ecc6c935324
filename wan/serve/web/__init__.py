"""The page of a server: python -m wan.serve --web. A client of `Service`, as the routes are; needs gradio.

texts (all that it says, in two languages) -> form (fields, from the schema of options) -> shown (jobs as HTML) ->
follow (what happens to jobs) -> page (components and events) -> events (what browsers send for them) -> mount (who may
fetch what), uploads, login. Nothing else imports this package, unless --web is given.
"""
