"""Leave out the scripts of Thebe: Jupyter Book adds them twice, which is an error on every page, and no page uses them."""


def without_thebe(app, pagename, templatename, context, doctree):
    context["script_files"] = [script for script in context["script_files"]
                               if "thebe" not in (str(script.filename) + script.attributes.get("body", "")).lower()]


def setup(app):
    app.connect("html-page-context", without_thebe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
