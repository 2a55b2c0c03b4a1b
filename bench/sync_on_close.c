/* Makes a receiver that never syncs durable, to have a peer of the same class: what it closes with fclose is synced
 * first, and its folder afterwards. storescp +B closes the file before it answers.
 *   cc -shared -fPIC -O2 -o sync_on_close.so sync_on_close.c -ldl; LD_PRELOAD=./sync_on_close.so storescp ... */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void sync_folder_of(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t count = readlink(link, path, sizeof path - 1);
    if (count <= 0) abort();
    path[count] = 0;
    char *slash = strrchr(path, '/');
    if (slash == NULL || slash == path) return;
    *slash = 0;
    int folder = open(path, O_RDONLY | O_DIRECTORY);
    if (folder < 0 || fsync(folder)) abort();
    close(folder);
}

int fclose(FILE *stream) {
    static int (*original)(FILE *);
    if (!original) original = (int (*)(FILE *))dlsym(RTLD_NEXT, "fclose");
    int file = fileno(stream);
    struct stat about;
    if (file > 2 && !fstat(file, &about) && S_ISREG(about.st_mode) &&
        (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY) {
        if (fflush(stream) || fdatasync(file)) abort();
        sync_folder_of(file);
    }
    return original(stream);
}
