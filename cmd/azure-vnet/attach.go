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

// The words attach and detach serve containers that no CNI runtime made: those of docker-run.sh. A runtime on the same
// host may have containers on the same network, and its GC ends all containers that its list lacks. Two things keep the
// GC off the containers of attach. Their owner begins with "attach/". And libcni keeps its results of them in a
// directory of azure-vnet: in the directory that runtimes use, the GC of a runtime's libcni would find them and call DEL.

// resultsIn is the directory of results in libcni's cache directory. It has a file for each interface of a container.
const resultsIn = "results"

// attach serves the word attach: it runs ADD of a whole conflist, and prints the container's address.
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
	if err := moveEarlierResults(); err != nil { // the error is about other containers, so this one is attached all the same
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

// detach serves the word detach: it runs DEL of a whole conflist, with the result of ADD that libcni kept. The namespace
// may be missing from the arguments, if it is gone.
func detach(ctx context.Context, args []string) error {
	if len(args) == 2 {
		args = append(args, "")
	}
	if len(args) != 3 {
		return fmt.Errorf("detach wants a conflist and a container's id\n\n%s", usage)
	}
	if err := moveEarlierResults(); err != nil { // the error is about other containers, so this one is detached all the same
		fmt.Fprintln(os.Stderr, "azure-vnet:", err)
	}
	run, list, rt, err := openConflist(args)
	if err != nil {
		return err
	}
	return run.DelNetworkList(ctx, list, rt)
}

// openConflist returns libcni for a conflist, a container's id and its namespace. libcni looks for plugins in the
// directory of this program.
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

// conflistMost bounds the size of a conflist, in bytes. It is far more than a list of plugins needs.
const conflistMost = 1 << 20

// checkConflist refuses a path that is no regular file. libcni would wait for ever for somebody to write to a FIFO.
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

// moveEarlierResults moves the results of earlier builds' attach out of the directory that runtimes use, and into
// azure-vnet's. Without that, the GC of a runtime's libcni ends these containers.
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

// isEarlierAttach reports whether a result of libcni's is of an earlier build's attach. Its CNI_ARGS had exactly three
// keys, and its namespace was a process's. A kubelet's runtime has a fourth key, the sandbox's id.
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

// moveResult copies the file into azure-vnet's directory, and then removes it. A crash in between leaves both files, and
// the next call moves the file again.
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

// hasOurResult reports whether an earlier build's attach attached the container with this owner, which looks like a
// runtime's.
func hasOurResult(owner string) bool {
	name := strings.ReplaceAll(strings.TrimPrefix(owner, "cni/"), "/", "-")
	_, err := os.Stat(filepath.Join(cni.StateDir, resultsIn, name))
	return err == nil
}
