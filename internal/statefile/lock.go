// Copyright (c) The azure-vnet authors. MIT licence.

package statefile

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/gofrs/flock"
)

// lockPatience is how long Lock waits if its ctx has no deadline.
const lockPatience = 10 * time.Second

// Lock takes the lock on the file at path, and returns a function that gives it back. It makes the file and its
// directory if they are missing. It waits until ctx is done, and 10 s at most if ctx has no deadline. The error then
// names the holder by its who. A pid would not do, because it means nothing in another pid namespace. If the holder
// dies, the kernel frees the lock.
//
// The kernel queues those who wait in flock(2). If 200 processes tried again and again instead, most of them would
// starve. Of one process, only one caller waits in the kernel, and the others wait for their turn to do so: a thread
// cannot be called back from flock(2). Without turns, the threads of callers that gave up would pile up behind a holder
// that does not go on.
func Lock(ctx context.Context, path, who string) (unlock func(), err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, lockPatience)
		defer cancel()
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		l, err := openLock(path)
		if err != nil {
			return nil, err
		}
		ok, err := l.TryLock()
		if err == nil && !ok {
			err = waitForLock(ctx, l, turnAt(path))
		}
		if err != nil && ctx.Err() != nil {
			return nil, fmt.Errorf("lock %s, which is held for %q: %w", path, readHolder(path), ctx.Err())
		} else if err != nil {
			l.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if isCurrent(l) {
			return markTaken(l, who), nil
		}
		l.Close()
	}
}

// TryLock is Lock without the wait. ok is false if another process holds the lock.
func TryLock(path, who string) (unlock func(), ok bool, err error) {
	l, err := openLock(path)
	if err != nil {
		return nil, false, err
	}
	if ok, err := l.TryLock(); err != nil || !ok || !isCurrent(l) {
		l.Close()
		if err != nil {
			err = fmt.Errorf("lock %s: %w", path, err)
		}
		return nil, false, err
	}
	return markTaken(l, who), true, nil
}

// openLock prepares the lock on the file, and makes its directory.
func openLock(path string) (*flock.Flock, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return flock.New(path, flock.SetFlag(os.O_CREATE|os.O_RDWR), flock.SetPermissions(0o600)), nil
}

// turns has a channel with room for one element for each path. The caller that filled the channel waits in the kernel.
// No channel is ever removed, because a process locks few files.
var turns sync.Map // string → chan struct{}

// turnAt returns the channel of a path.
func turnAt(path string) chan struct{} {
	turn, _ := turns.LoadOrStore(path, make(chan struct{}, 1))
	return turn.(chan struct{})
}

// waitForLock waits until the lock is taken or ctx is done. When ctx is done, the thread in flock(2) still waits. As
// soon as that thread has the lock, it gives back both the lock and its turn.
func waitForLock(ctx context.Context, l *flock.Flock, turn chan struct{}) error {
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		l.Close()
		return ctx.Err()
	}
	got := make(chan error, 1)
	go func() { got <- l.Lock() }()
	select {
	case err := <-got:
		<-turn
		return err
	case <-ctx.Done():
		go func() {
			<-got
			l.Close()
			<-turn
		}()
		return ctx.Err()
	}
}

// markTaken writes the holder into the lock file, and returns a function that gives the lock back.
func markTaken(l *flock.Flock, who string) (unlock func()) {
	// If the disk is full, the name is missing. The lock holds all the same.
	_ = os.WriteFile(l.Path(), []byte(who), 0o600)
	return func() { l.Close() }
}

// isCurrent reports whether the locked file is still the file at its path. If it was deleted meanwhile, others lock
// another file.
func isCurrent(l *flock.Flock) bool {
	mine, err := l.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(l.Path())
	return err == nil && os.SameFile(mine, there)
}

// readHolder returns the name of the holder. It may be the one before: the holder writes its name just after it took
// the lock.
func readHolder(path string) string {
	who, _ := os.ReadFile(path)
	return strings.TrimSpace(string(who))
}
