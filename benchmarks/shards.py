"""Image shards of given bytes, as preparation writes them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_kosmos.data.corpora.hashed_file import HashedFile
from megatron_kosmos.data.corpora.image_store import INDEX_SUFFIX, shard_suffix
from megatron_kosmos.data.corpora.manifest import path_with
from megatron_kosmos.data.preparation.encoding import EncodedImage
from megatron_kosmos.data.preparation.image_writing import ImageTarWriter, write_image_index
from megatron_kosmos.data.preparation.tables import DOCUMENT, IMAGE, Tables


def write_shards(prefix: Path, pictures: Iterable[bytes], extension: str) -> None:
    """Write `PREFIX-images-00000.tar` and its index, a document for each picture."""
    tar = HashedFile(path_with(prefix, shard_suffix(0)))
    writer = ImageTarWriter(lambda name: tar, "000000", 1 << 40)
    places = []
    for number, data in enumerate(pictures):
        _, offset = writer.append(number, [EncodedImage(data, extension, 1)])
        places.append((offset, len(data)))
    writer.finish()
    tar.close()
    documents, images = np.zeros(len(places), DOCUMENT), np.zeros(len(places), IMAGE)
    documents["images"], images["position"] = 1, 1
    images["offset"], images["size"] = np.array(places).T
    index = HashedFile(path_with(prefix, INDEX_SUFFIX))
    write_image_index(index, len(places), len(places), lambda: [Tables(documents, images)])
    index.close()
