// Copyright (c) The azure-vnet authors. MIT licence.

// Package statefile keeps one Go value in one JSON file, which all processes of a host share. It is not a database. A
// process reads the file whole. It changes the value under the file's lock, and replaces the file whole by a rename. So
// a reader needs no lock, and a process that is killed between any two lines leaves the old value or the new one.
//
// Programs of several versions may share a file. If a program does not know a key in it, the key survives the program's
// changes: see merge.go.
package statefile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"
)

var (
	// ErrUnreadable is in the error of a file that exists and has no such value: it is empty, truncated or full of
	// NULs, or its Check refuses it. The file stays as it is. SetAside renames it.
	ErrUnreadable = errors.New("unreadable state")

	// ErrUnchanged is returned by a change that has nothing to write. The update then ends as a success.
	ErrUnchanged = errors.New("unchanged")
)

// Checker is a value that can say whether it is of use, for example by its version. If Check returns an error, the file
// counts as ErrUnreadable. The zero value of a missing file is not checked.
type Checker interface{ Check() error }

// Read returns the value in the file, and the zero value if there is no file. It takes no lock.
func Read[T any](path string) (T, error) {
	v, _, err := loadFile[T](path)
	return v, err
}

// Update reads the value, has change alter it, and writes it back if it differs, all under the file's lock. If there is
// no file, change is given the zero value. Missing directories are made. If change returns an error, Update returns the
// same error and writes nothing.
//
// who names the holder of the lock, for the error of a process that waits in vain. If the process is killed, the
// kernel frees the lock, and the file has the old value or the new one.
func Update[T any](ctx context.Context, path, who string, change func(*T) error) error {
	return updateFile(ctx, path, who, false, change)
}

// UpdateDurably is Update for a value that must outlive a power cut: when it returns, the file and its directory entry
// are on the disk.
func UpdateDurably[T any](ctx context.Context, path, who string, change func(*T) error) error {
	return updateFile(ctx, path, who, true, change)
}

// updateFile is Update, or UpdateDurably if durable is true.
func updateFile[T any](ctx context.Context, path, who string, durable bool, change func(*T) error) error {
	unlock, err := Lock(ctx, path+".lock", who)
	if err != nil {
		return err
	}
	defer unlock()
	v, old, err := loadFile[T](path)
	if err != nil {
		return err
	}
	var known []byte // the part of the old value that this program knows; nil: it knows all of it
	if old.foreign {
		if known, err = encodeValue(&v); err != nil {
			return fmt.Errorf("encode %s: %w", path, err)
		}
	}
	if err := change(&v); errors.Is(err, ErrUnchanged) {
		return nil
	} else if err != nil {
		return err
	}
	body, err := encodeValue(&v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	if old.foreign {
		if body, err = mergeUnknown(old.body, known, body); err != nil {
			return fmt.Errorf("keep what others wrote in %s: %w", path, err)
		}
	}
	if body = append(body, '\n'); bytes.Equal(body, old.body) {
		return nil
	}
	// The temporary file always has the same name: this caller holds the lock, and overwrites what a killed writer left.
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return replaceFile(f, path, body, durable)
}

// Replace writes body to the file at path, whole or not at all, with the permissions of mode. It makes missing
// directories. It takes no lock: of several writers, the last one counts. Each writes a temporary file of its own. If it is
// killed, that file stays: <path>.tmp-<number>.
func Replace(path string, body []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := f.Chmod(mode); err != nil {
		f.Close()
		os.Remove(f.Name())
		return fmt.Errorf("write state: %w", err)
	}
	return replaceFile(f, path, body, false)
}

// SetAside renames an unreadable file to <path>.bad-<time>, so that the next Update begins with the zero value. It
// keeps the newest such file, and removes the others. It reads the file again under the lock: if the file can be read
// by then, or is missing, SetAside does nothing.
func SetAside[T any](ctx context.Context, path, who string) error {
	unlock, err := Lock(ctx, path+".lock", who)
	if err != nil {
		return err
	}
	defer unlock()
	if _, _, err := loadFile[T](path); !errors.Is(err, ErrUnreadable) {
		return err
	}
	before := ListAside(path)
	bad := path + ".bad-" + time.Now().UTC().Format("20060102T150405.000000000Z")
	if err := os.Rename(path, bad); err != nil {
		return fmt.Errorf("set %s aside: %w", path, err)
	}
	for _, b := range before {
		os.Remove(b) // if this fails, an old copy stays, which harms nobody
	}
	return nil
}

// ListAside lists the paths of the files that SetAside renamed.
func ListAside(path string) []string {
	entries, _ := os.ReadDir(filepath.Dir(path)) // a directory that cannot be read counts as empty
	var bad []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+".bad-") {
			bad = append(bad, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	return bad
}

// content is a file as it was read. It is zero if there is no file.
type content struct {
	body    []byte
	foreign bool // the body has keys that this program does not know
}

// loadFile reads the file, and decodes the value. If there is no file, both are zero.
func loadFile[T any](path string) (v T, c content, err error) {
	body, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return v, content{}, nil
	} else if err != nil {
		return v, content{}, fmt.Errorf("read state: %w", err)
	}
	v, foreign, err := decodeValue[T](body)
	if err != nil {
		return v, content{}, fmt.Errorf("%w: %s: %w", ErrUnreadable, path, err)
	}
	return v, content{body, foreign}, nil
}

// decodeValue decodes a file. foreign reports whether the body has keys that this program does not know. Nearly always
// it has none. So decodeValue first decodes strictly, and looks no further if that succeeds.
func decodeValue[T any](body []byte) (v T, foreign bool, err error) {
	if !decodeStrict(body, &v) {
		v, foreign = *new(T), true
		if err := decodeLenient(body, &v); err != nil {
			return *new(T), false, err
		}
	}
	if c, ok := any(&v).(Checker); ok {
		if err := c.Check(); err != nil {
			return *new(T), false, err
		}
	}
	return v, foreign, nil
}

// format makes the encoding of a value unique, so that Update can compare two values by their bytes. A nil slice or map
// is encoded as null, and an empty one as empty, so that both come back as they were.
var format = json.JoinOptions(json.Deterministic(true), json.FormatNilSliceAsNull(true), json.FormatNilMapAsNull(true), jsonv1.FormatDurationAsNano(true), jsonv1.OmitEmptyWithLegacySemantics(true),
	jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))

func encodeValue(v any) ([]byte, error) { return json.Marshal(v, format) }

// decodeStrict decodes a body, and is false if the body has keys that v lacks or is not such a value.
func decodeStrict(body []byte, v any) bool {
	return json.Unmarshal(body, v, format, json.RejectUnknownMembers(true)) == nil && !isNull(body)
}

// decodeLenient decodes a body, and ignores keys that v lacks.
func decodeLenient(body []byte, v any) error {
	switch {
	case len(bytes.TrimSpace(body)) == 0:
		return errors.New("it is empty")
	case isNull(body):
		return errors.New("it holds null")
	}
	return json.Unmarshal(body, v, format)
}

func isNull(body []byte) bool { return string(bytes.TrimSpace(body)) == "null" }

// replaceFile writes the temporary file f, closes it, and renames it to path. If replaceFile fails, the old file stays,
// and f is removed.
func replaceFile(f *os.File, path string, body []byte, durable bool) error {
	_, err := f.Write(body)
	if err == nil && durable {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name()) // maybe this file filled the disk
		return fmt.Errorf("write state, %s is as it was: %w", path, err)
	}
	if durable {
		return syncDir(filepath.Dir(path))
	}
	return nil
}

// syncDir has the entries of a directory written to the disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	return nil
}
