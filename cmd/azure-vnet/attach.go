// Copyright (c) The azure-vnet authors. MIT licence.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"azurevnet/internal/cni"
)

// The words attach and detach are for containers that no runtime of CNI's made: those of
// docker-run.sh. A runtime on the same host may have containers on the same network, and its
// GC ends all that its list lacks. So these containers have two marks: their owner is
// "attach/…", and libcni keeps what it knows of them in a directory of ours. In its own
// directory the GC of a runtime's libcni would find them and call DEL for them.

// resultsIn is where libcni keeps files in its directory, one for each container's interface.
const resultsIn = "results"

// attach runs ADD for a container that no runtime of CNI's made.
func attach(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("attach", flag.ContinueOnError)
	name := flags.String("name", "", "of the pod")
	namespace := flags.String("namespace", "", "of the pod")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 3 {
		return fmt.Errorf("attach wants a conflist, a container's id and its namespace\n\n%s", usage)
	}
	if err := moveEarlierResults(); err != nil { // which concerns other containers
		fmt.Fprintln(os.Stderr, "azure-vnet:", err)
	}
	run, list, rt, err := openConflist(flags.Args())
	if err != nil {
		return err
	}
	rt.Args = append(rt.Args, [2]string{"K8S_POD_NAMESPACE", *namespace}, [2]string{"K8S_POD_NAME", *name})
	answer, err := run.AddNetworkList(ctx, list, rt)
	if err != nil {
		return err
	}
	result, err := current.GetResult(answer)
	if err != nil {
		return err
	}
	for _, ip := range result.IPs {
		fmt.Fprintln(out, ip.Address.IP)
		return nil
	}
	return errors.New("ADD succeeded, and gave no address: the conflist needs a plugin that gives one, such as azure-vnet")
}

// detach runs DEL, with what libcni kept of ADD. Without a namespace it is gone.
func detach(ctx context.Context, args []string) error {
	if len(args) == 2 {
		args = append(args, "")
	}
	if len(args) != 3 {
		return fmt.Errorf("detach wants a conflist and a container's id\n\n%s", usage)
	}
	if err := moveEarlierResults(); err != nil { // which concerns other containers
		fmt.Fprintln(os.Stderr, "azure-vnet:", err)
	}
	run, list, rt, err := openConflist(args)
	if err != nil {
		return err
	}
	return run.DelNetworkList(ctx, list, rt)
}

// openConflist is libcni for a conflist and a container. The plugins lie where this one
// does.
func openConflist(args []string) (*libcni.CNIConfig, *libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	if err := checkConflist(args[0]); err != nil {
		return nil, nil, nil, err
	}
	list, err := libcni.NetworkConfFromFile(args[0])
	if err != nil {
		return nil, nil, nil, fmt.Errorf("%s: %w", args[0], err)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, nil, err
	}
	if strings.ContainsAny(args[1], "/ ") {
		return nil, nil, nil, fmt.Errorf("%.80q is not a container's id, which has no slash and no space: docker inspect -f '{{.Id}}' NAME shows it", args[1])
	}
	rt := &libcni.RuntimeConf{ContainerID: args[1], NetNS: args[2], IfName: "eth0", Args: [][2]string{{"IgnoreUnknown", "1"}, cni.AttachArg}}
	return libcni.NewCNIConfigWithCacheDir([]string{filepath.Dir(self)}, cni.StateDir, nil), list, rt, nil
}

// conflistMost is far above what a list of plugins needs, in bytes.
const conflistMost = 1 << 20

// checkConflist refuses at once what is no file: libcni would wait for somebody to write to a FIFO.
func checkConflist(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var info unix.Stat_t
	switch err := unix.Fstat(fd, &info); {
	case err != nil:
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	case info.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s is not a file: name the list of plugins, such as /etc/cni/net.d/10-azure.conflist", path)
	case info.Size > conflistMost:
		return fmt.Errorf("%s has %d bytes, and a list of plugins has %d at most: name a conflist", path, info.Size, conflistMost)
	}
	return nil
}

// moveEarlierResults moves what earlier builds' attach had libcni keep in the directory that
// runtimes use, into ours. Without that, a GC of a runtime's libcni ends these containers.
func moveEarlierResults() error {
	files, err := os.ReadDir(filepath.Join(libcni.CacheDir, resultsIn))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, file := range files {
		name := filepath.Join(libcni.CacheDir, resultsIn, file.Name())
		if text, bad := os.ReadFile(name); bad == nil && isEarlierAttach(text) {
			err = errors.Join(err, moveResult(name, text))
		}
	}
	if err != nil {
		return fmt.Errorf("keep runtimes off what an earlier build attached: %w", err)
	}
	return nil
}

// isEarlierAttach reports whether what libcni kept is of an earlier build's attach. Its CNI_ARGS
// were these three and the namespace was a process's. A kubelet's runtime adds the sandbox's id.
func isEarlierAttach(text []byte) bool {
	var kept struct {
		Kind    string
		NetNS   string
		CNIArgs [][2]string
	}
	if json.Unmarshal(text, &kept) != nil || kept.Kind != libcni.CNICacheV1 {
		return false
	}
	var keys []string
	for _, arg := range kept.CNIArgs {
		keys = append(keys, arg[0])
	}
	return strings.HasPrefix(kept.NetNS, "/proc/") && slices.Equal(keys, []string{"IgnoreUnknown", "K8S_POD_NAMESPACE", "K8S_POD_NAME"})
}

// moveResult copies the file and then removes it. After a crash in between it is there twice, and
// the next call repeats this.
func moveResult(name string, text []byte) error {
	dir := filepath.Join(cni.StateDir, resultsIn)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), text, 0o600); err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// hasOurResult reports whether a container with a runtime's owner is one that an earlier build's
// attach attached.
func hasOurResult(owner string) bool {
	name := strings.ReplaceAll(strings.TrimPrefix(owner, "cni/"), "/", "-")
	_, err := os.Stat(filepath.Join(cni.StateDir, resultsIn, name))
	return err == nil
}
