// Package image builds container images from files of this machine, without a
// registry and without Docker.
package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Image describes an image of one layer.
type Image struct {
	Name       string // registry/path:tag
	Entrypoint []string
	Command    []string
	User       string // uid[:gid]
	// Files are HOST=IMAGE pairs of paths; "->TARGET=IMAGE" is a symbolic link.
	Files []string
}

// Write builds the image and writes it as a tar that "ctr images import" takes.
// The same files give the same image.
func (i Image) Write(file string) error {
	tag, err := name.NewTag(i.Name)
	if err != nil {
		return fmt.Errorf("name image %q: %w", i.Name, err)
	}
	content, err := i.layer()
	if err != nil {
		return fmt.Errorf("build image %s: %w", i.Name, err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content)), nil
	})
	if err != nil {
		return fmt.Errorf("build image %s: %w", i.Name, err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("build image %s: %w", i.Name, err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("configure image %s: %w", i.Name, err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	config.Config = v1.Config{
		Entrypoint: i.Entrypoint, Cmd: i.Command, User: i.User,
		Env: []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return fmt.Errorf("configure image %s: %w", i.Name, err)
	}
	if err := tarball.WriteToFile(file+".new", tag, img); err != nil {
		return fmt.Errorf("write image %s: %w", i.Name, err)
	}
	return os.Rename(file+".new", file)
}

// layer is the image's only layer, as a tar.
func (i Image) layer() ([]byte, error) {
	var out bytes.Buffer
	l := &layer{w: tar.NewWriter(&out), dirs: []string{"/", "."}}
	l.dir("/tmp")
	l.file("/etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"))
	l.file("/etc/group", 0o644, []byte("root:x:0:\nnobody:x:65534:\n"))
	for _, f := range i.Files {
		host, in, ok := strings.Cut(f, "=")
		if !ok || !path.IsAbs(in) {
			return nil, fmt.Errorf("want HOST=/PATH/IN/IMAGE, got %q", f)
		}
		if target, link := strings.CutPrefix(host, "->"); link {
			l.entry(tar.Header{Typeflag: tar.TypeSymlink, Name: in, Linkname: target, Mode: 0o777}, nil)
			continue
		}
		b, err := os.ReadFile(host)
		if err != nil {
			return nil, err
		}
		l.file(in, 0o755, b)
	}
	if l.err == nil {
		l.err = l.w.Close()
	}
	return out.Bytes(), l.err
}

// layer writes a tar and remembers the first error.
type layer struct {
	w    *tar.Writer
	dirs []string // already in it
	err  error
}

func (l *layer) dir(d string) {
	if slices.Contains(l.dirs, d) {
		return
	}
	l.dirs = append(l.dirs, d)
	mode := int64(0o755)
	if d == "/tmp" {
		mode = 0o1777
	}
	l.entry(tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: mode}, nil)
}

func (l *layer) file(name string, mode int64, content []byte) {
	l.entry(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}, content)
}

func (l *layer) entry(h tar.Header, content []byte) {
	l.dir(path.Dir(path.Clean(h.Name)))
	if l.err != nil {
		return
	}
	h.Name = strings.TrimPrefix(h.Name, "/")
	h.ModTime = time.Unix(0, 0)
	if l.err = l.w.WriteHeader(&h); l.err == nil {
		_, l.err = l.w.Write(content)
	}
}
