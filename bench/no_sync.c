/* Takes the syncs out of a process: what it answers is in the page cache and no more (class N, policy `written`). Not
 * part of the product: it makes the figure P6.
 *   cc -shared -fPIC -O2 -o no_sync.so no_sync.c; LD_PRELOAD=./no_sync.so clarion serve ... */
int fsync(int file) { (void)file; return 0; }
int fdatasync(int file) { (void)file; return 0; }
