"""A bundle on a cluster of Ray: films of a data set answered by actors, and the server as a deployment.

`pip install 'framefusion-aot[ray]'`. What runs on each node is the package and a bundle; nothing goes through Ray's
object store but paths and answers.
"""

from framefusion.runtime.ray.films import FilmAnswers as FilmAnswers
from framefusion.runtime.ray.serving import server_deployment as server_deployment
