/* The threads of a decoder: they look for the next call for a while, then sleep. */

typedef struct {
    Decoder *decoder;
    int thread;
} Place;

static void *worker(void *given) {
    Place place = *(Place *)given;
    Decoder *d = place.decoder;
    free(given);
    for (int done = 0;; done++) {
        for (int64_t spins = 0; atomic_load_explicit(&d->call, memory_order_acquire) == done; spins++) {
            _mm_pause();
            if (spins < SPINS) continue;
            pthread_mutex_lock(&d->lock);
            d->sleeping++;
            while (atomic_load(&d->call) == done) pthread_cond_wait(&d->wake, &d->lock);
            d->sleeping--;
            pthread_mutex_unlock(&d->lock);
        }
        if (d->ending) return NULL;
        work(d, place.thread);
    }
}

static void begin(Decoder *d) {
    atomic_fetch_add(&d->call, 1);
    pthread_mutex_lock(&d->lock);
    if (d->sleeping) pthread_cond_broadcast(&d->wake);
    pthread_mutex_unlock(&d->lock);
}

static int start_threads(Decoder *d) {
    d->workers = calloc((size_t)d->threads, sizeof *d->workers);
    if (!d->workers || pthread_mutex_init(&d->lock, NULL) || pthread_cond_init(&d->wake, NULL)) return 0;
    for (int i = 1; i < d->threads; i++) {
        Place *place = malloc(sizeof *place);
        if (!place) return 0;
        *place = (Place){d, i};
        if (pthread_create(&d->workers[i], NULL, worker, place)) {
            free(place);
            return 0;
        }
    }
    return 1;
}

static void end_threads(Decoder *d) {
    d->ending = 1;
    begin(d);
    for (int i = 1; i < d->threads; i++)
        if (d->workers && d->workers[i]) pthread_join(d->workers[i], NULL);
}
