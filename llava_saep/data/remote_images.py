"""Images that a person shows a model, by path or by address; training data are files."""

import http.client
import io
import urllib.request
from pathlib import Path

from PIL import Image

from llava_saep.data.images import load_image
from llava_saep.errors import UserError

MAX_DOWNLOAD_BYTES = 100 * 2**20
TIMEOUT_SECONDS = 30.0


def find_image(path_or_url: str | Path) -> Path | Image.Image:
    """Return the path of a readable image file, or the image at an http(s) address, in RGB.

    Raises:
        UserError: the file is missing, nothing can be fetched from the address, or it is no image.
    """
    if isinstance(path_or_url, str) and path_or_url.startswith(("http://", "https://")):
        return _fetch(path_or_url)
    load_image(path_or_url)
    return Path(path_or_url)


def _fetch(url: str) -> Image.Image:
    # Some servers answer no program that does not say what it is.
    request = urllib.request.Request(url, headers={"User-Agent": "llava-saep"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be fetched ({error})") from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise UserError(f"{url}: is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB, and no image to ask about")
    return load_image(io.BytesIO(content), name=url)
