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

// patience is the longest wait for a lock when ctx has no deadline.
const patience = 10 * time.Second

// Lock takes the lock file at path, made with its directory if missing, and
// returns what gives it back. It waits until ctx is done, at most 10 s if ctx
// has no deadline; the error then names the holder, which is what it passed as
// who: a pid would mean nothing in another pid namespace. The kernel frees the
// lock of a process that dies.
//
// The wait is in the kernel, which queues: of 200 processes that try again and
// again instead, most starve. Of one process only one caller waits there, and the
// others for their turn to: nothing calls a thread back from flock(2), and those
// of callers that gave up would pile up behind a holder that is stopped.
func Lock(ctx context.Context, path, who string) (unlock func(), err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, patience)
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

// TryLock is Lock without the wait: false if another holds the lock.
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

func openLock(path string) (*flock.Flock, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return flock.New(path, flock.SetFlag(os.O_CREATE|os.O_RDWR), flock.SetPermissions(0o600)), nil
}

// turns are, by path, what a caller fills to wait in the kernel. A process locks
// few files, so none is ever removed.
var turns sync.Map // string → chan struct{} with room for one

func turnAt(path string) chan struct{} {
	turn, _ := turns.LoadOrStore(path, make(chan struct{}, 1))
	return turn.(chan struct{})
}

// waitForLock blocks until the lock is taken or ctx is done. A thread that nobody waits
// for any more gives up the lock, and its turn, as soon as it has it.
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

func markTaken(l *flock.Flock, who string) (unlock func()) {
	// A full disk may refuse the name; the lock holds all the same.
	_ = os.WriteFile(l.Path(), []byte(who), 0o600)
	return func() { l.Close() }
}

// isCurrent says that the lock is on the file that others will open, and not on
// one that was deleted in between.
func isCurrent(l *flock.Flock) bool {
	mine, err := l.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(l.Path())
	return err == nil && os.SameFile(mine, there)
}

// readHolder is best effort: the name is written just after the lock is taken.
func readHolder(path string) string {
	who, _ := os.ReadFile(path)
	return strings.TrimSpace(string(who))
}
