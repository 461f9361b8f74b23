"""A page to try MaskCLIP on one's own photo, and the JSON endpoint it uses: `python run.py serve`.

    cache.py    what is kept of the last images, within a number of bytes
    models.py   the models that can be picked, and the words each has read
    request.py  a request's JSON, checked
    session.py  images in, masks and files out: everything but HTTP
    limits.py   what a question may cost, and how many programs are kept
    intake.py   bodies within a number of bytes, connections that end
    warmup.py   programs compiled before the first visitor
    server.py   HTTP: routes, limits, one visitor after the other
    static/     the page: one HTML file, one script, one style sheet

Why not gradio, which the field takes for this: it keeps uploads on disk, fetches fonts from outside, and shows a mask's
class under the pointer, but neither its confidence nor a class's heat map nor a tint that follows a slider without the
server. Starlette and uvicorn are small, well kept, and leave the page to us.
"""
