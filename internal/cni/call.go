// Copyright (c) The azure-vnet authors. MIT licence.

// Package cni is the Container Network Interface as both plugins of azure-vnet speak it. It reads one call with its
// configuration, and writes one JSON document as the answer and one line in the log. It knows no pool and no bridge:
// what a verb does is in package main of each plugin.
//
// Package skel of the CNI project reads the call. The answer is written here, once, at the end of the call. So a panic,
// a bad environment and a bad configuration end in an error document too.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Plugin is a plugin's name and what it does for each verb. The verb VERSION is answered here.
type Plugin struct {
	Name    string // of the binary
	Version string // of the release
	Main    bool   // it is a main plugin: the whole configuration is read, and not only the part for IPAM

	CheckNames func(Conf) error // is an error if no link can have the names in the configuration; nil: they are not checked
	Code       func(error) uint // returns the CNI error code of an error, 0 if it knows none; nil: it knows none

	Add    func(context.Context, *Call) (*current.Result, error)
	Del    func(context.Context, *Call) error
	Check  func(context.Context, *Call) error
	GC     func(context.Context, *Call) error
	Status func(context.Context, *Call) error
}

// Call is one call of a plugin.
type Call struct {
	Verb        string // CNI_COMMAND: ADD, DEL, CHECK, GC, STATUS or VERSION
	ContainerID string
	Netns       string // path of the container's network namespace; may be empty with DEL
	IfName      string // name of the interface in that namespace
	Pod         string // namespace/name of the pod; empty: the runtime named none
	Stdin       []byte // the configuration as it came; a delegated plugin is given the same bytes
	Conf        Conf

	plugin Plugin
	attach bool  // the word attach or detach calls, and no runtime: see AttachArg
	notes  []any // for the log: keys and values in turn
}

// Times of a call. A failed ADD may take both: CRI-O kills a plugin after 60 s.
const (
	deadline = 30 * time.Second // bounds a call
	undoTime = 10 * time.Second // bounds the undoing of a failed ADD, which comes after the deadline
)

// Undo returns a context for the undoing of a failed call. It outlives ctx, whose deadline may have passed.
func Undo(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}

// Main serves the call that this process was started for, and ends the process.
func Main(p Plugin) {
	runtime.GOMAXPROCS(1) // nothing in a call runs in parallel: this saves an eighth of its CPU time
	os.Exit(p.serve(os.Stdout))
}

// serve answers the call that the environment describes. It writes at most one document, at its very end, and returns
// the exit code.
func (p Plugin) serve(out io.Writer) int {
	start := time.Now()
	// skel reads the same values. But if skel refuses the call, it hands none of them on, and the log needs them.
	said, _ := parseArgs(os.Getenv("CNI_ARGS")) // a part that cannot be read is refused later, by readWishes
	call := &Call{
		plugin: p, Verb: os.Getenv("CNI_COMMAND"), ContainerID: os.Getenv("CNI_CONTAINERID"), Netns: os.Getenv("CNI_NETNS"), IfName: os.Getenv("CNI_IFNAME"), Pod: podOf(said),
	}
	answer, err := p.answer(call)
	code := 0
	if err != nil {
		answer, code = call.errorDocument(err), 1
	}
	if len(answer) > 0 {
		if _, bad := out.Write(append(answer, '\n')); bad != nil && err == nil {
			err, code = bad, 1
		}
	}
	call.log(start, err)
	return code
}

// answer has skel read and check the call, and then has the plugin serve it. It returns the document with the result of
// ADD. The other verbs have no result, and skel itself answers VERSION.
func (p Plugin) answer(call *Call) (document []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			call.Note("stack", string(debug.Stack()))
			err = fmt.Errorf("%s panicked, which is a mistake in it: %v", p.Name, r)
		}
	}()
	if call.Verb == "" {
		fmt.Fprintf(os.Stderr, "%s %s is a CNI plugin: a container runtime calls it.\n", p.Name, p.Version)
	} else if err := call.readStdinFirst(); err != nil {
		return nil, err
	}
	// After the work, skel compares the container's namespace with the host's. It would fail a DEL again and again if the
	// path of its namespace is left and the namespace is not. The override has skel compare nothing. Package bridge
	// compares both, before it does anything.
	if err := os.Setenv("CNI_NETNS_OVERRIDE", "1"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	with := func(do func(context.Context, *Call) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error {
			err := call.takeArgs(args)
			if err == nil {
				err = call.serve(ctx, do)
			}
			if err != nil {
				return call.toError(err) // skel would give an error of any other type the code of an internal error
			}
			return nil
		}
	}
	funcs := skel.CNIFuncs{
		Add: with(func(ctx context.Context, c *Call) error {
			result, err := p.Add(ctx, c)
			if err == nil {
				document, err = c.document(result)
			}
			return err
		}),
		Del: with(p.Del), Check: with(p.Check), GC: with(p.GC), Status: with(p.Status),
	}
	if e := skel.PluginMainFuncsWithError(funcs, version.All, ""); e != nil {
		return nil, e
	}
	return document, nil
}

// serve calls do, which does what the verb says. ADDs and DELs of one interface wait for each other. STATUS first tries
// to write into the directory that ADD and DEL write to.
func (c *Call) serve(ctx context.Context, do func(context.Context, *Call) error) error {
	if c.Verb == "STATUS" {
		if err := c.tryState(); err != nil {
			return err
		}
	}
	if c.Verb == "ADD" || c.Verb == "DEL" {
		unlock, err := c.lockOwner(ctx)
		if err != nil {
			return err
		}
		defer unlock()
	}
	return do(ctx, c)
}

// Bounds of the configuration on stdin.
const (
	stdinMost = 1 << 20          // bytes. GC's list of a few hundred attachments has some 30 KB
	stdinTime = 10 * time.Second // a runtime may fail to close its end of stdin
)

// readStdin reads the configuration, within both bounds. wait is stdinTime.
//
// Bytes that are there are read even if the time is over. On a busy node with many calls, a process may get no CPU time
// for ten seconds. Its runtime has closed stdin by then.
func readStdin(wait time.Duration) ([]byte, error) {
	end := time.Now().Add(wait)
	var conf []byte
	some := make([]byte, 64<<10)
	for len(conf) <= stdinMost {
		if !awaitInput(os.Stdin, end) {
			return nil, Errorf(types.ErrIOFailure, "the network configuration on stdin does not end within %v: the runtime must close its end", wait)
		}
		n, err := os.Stdin.Read(some)
		conf = append(conf, some[:n]...)
		if errors.Is(err, io.EOF) {
			return conf, nil
		} else if err != nil {
			return nil, Errorf(types.ErrIOFailure, "read the network configuration: %v", err)
		}
	}
	return nil, Errorf(types.ErrInvalidNetworkConfig, "the network configuration on stdin is longer than %d bytes", stdinMost)
}

// readStdinFirst reads the configuration before skel does. skel may refuse a call before it reads the configuration, and
// the error document needs the CNI version that the configuration names. The verb VERSION has no configuration.
func (c *Call) readStdinFirst() error {
	if c.Verb == "VERSION" {
		return nil
	}
	conf, err := readStdin(stdinTime)
	if err != nil {
		return err
	}
	c.Stdin, c.Conf = conf, readName(conf)
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("hand the network configuration on: %w", err)
	}
	// skel reads to the end of the pipe, or refuses the call before and reads nothing. This process keeps the reading end
	// open, so the write succeeds or waits until the process ends. If it failed all the same, skel would read less than
	// conf, and refuse that as no JSON. So its error tells nothing more.
	go func() {
		_, _ = write.Write(conf)
		_ = write.Close()
	}()
	os.Stdin = read
	return nil
}

// takeArgs takes what skel has read, and reads the configuration. DEL reads no more than the names: a configuration that
// became wrong since ADD must not keep a pod from ending.
func (c *Call) takeArgs(args *skel.CmdArgs) (err error) {
	c.ContainerID, c.Netns, c.IfName, c.Stdin = args.ContainerID, args.Netns, args.IfName, args.StdinData
	c.attach = slices.Contains(strings.Split(args.Args, ";"), AttachArg[0]+"="+AttachArg[1])
	if c.Verb == "DEL" {
		c.Conf = readName(c.Stdin)
		return nil
	}
	c.Conf, err = readConf(c.Stdin, args.Args, c.plugin)
	return err
}

// PrevResult returns the result of ADD that the runtime hands back. CHECK needs it.
func (c *Call) PrevResult() (*current.Result, error) {
	if len(c.Conf.prev) == 0 || string(c.Conf.prev) == "null" {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "%s of container %s: prevResult is missing", c.Verb, c.ContainerID)
	}
	r, err := version.NewResult(c.Conf.CNIVersion, c.Conf.prev)
	if err == nil {
		var prev *current.Result
		if prev, err = ConvertResult(r); err == nil {
			return prev, nil
		}
	}
	return nil, Errorf(types.ErrDecodingFailure, "prevResult: %v", err)
}

// ConvertResult returns another plugin's result in the newest version. It refuses null in the lists of the result. The
// library panics on null when it converts an older version, and an ADD that panics does not give its address back.
func ConvertResult(from types.Result) (r *current.Result, err error) {
	errNull := errors.New("it has null in the place of an address, a route or an interface: correct the plugin that wrote it")
	defer func() {
		if recover() != nil {
			r, err = nil, errNull
		}
	}()
	if r, err = current.NewResultFromResult(from); err != nil {
		return nil, err
	}
	if slices.Contains(r.IPs, nil) || slices.Contains(r.Routes, nil) || slices.Contains(r.Interfaces, nil) {
		return nil, errNull
	}
	return r, nil
}

// document returns the result in the CNI version of the configuration.
func (c *Call) document(r *current.Result) ([]byte, error) {
	converted, err := r.GetAsVersion(c.Conf.CNIVersion)
	if err != nil {
		return nil, fmt.Errorf("word the result as CNI %s: %w", c.Conf.CNIVersion, err)
	}
	return json.Marshal(converted)
}

// errorDocument returns the document of an error, in the CNI version of the configuration.
func (c *Call) errorDocument(err error) []byte {
	e := c.toError(err)
	text, _ := json.Marshal(struct { // strings and a number never fail
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{c.version(), e})
	return text
}

// version returns the configuration's CNI version, or the newest one if the configuration names none that is known.
func (c *Call) version() string {
	v := c.Conf.CNIVersion
	for _, known := range version.All.SupportedVersions() {
		if v == known {
			return v
		}
	}
	return version.Current()
}

// Note adds key=value to the call's line in the log.
func (c *Call) Note(key string, value any) { c.notes = append(c.notes, key, value) }
