// Command image makes the agent's container image from its binaries, from
// scratch and without a container engine: an OCI layout as a tar for amd64 and
// arm64, optionally pushed to a registry.
//
//	go run ./deploy/image --bin-amd64 bin/culvert-agent-amd64 --bin-arm64 bin/culvert-agent-arm64 \
//		--out dist/culvert-agent.tar --name ghcr.io/culvert-dev/culvert-agent:v0.1.0
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "image:", err)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.SetOutput(stderr)
	amd64 := flags.String("bin-amd64", "", "agent `binary` for amd64")
	arm64 := flags.String("bin-arm64", "", "agent `binary` for arm64")
	out := flags.String("out", "", "tar `file` to write")
	tagText := flags.String("name", "", "`NAME:TAG` of the image in the tar")
	push := flags.String("push", "", "push to `REGISTRY/NAME:TAG`, with the credentials of docker login or podman login")
	version := flags.String("version", "", "version label (default: the tag)")
	licence := flags.String("licence", "Apache-2.0", "licence label, an SPDX `expression`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if *out == "" && *push == "" {
		return errors.New("nothing to do: give --out FILE, --push REGISTRY/NAME:TAG or both")
	}
	if *tagText == "" {
		*tagText = *push
	}
	if *tagText == "" {
		return errors.New("--name NAME:TAG is missing")
	}
	tag, err := parseTag(*tagText)
	if err != nil {
		return err
	}
	var target name.Tag
	if *push != "" {
		if target, err = parseTag(*push); err != nil {
			return err
		}
	}
	if *version == "" {
		*version = tag.TagStr()
	}
	created, err := creationTime(os.Getenv("SOURCE_DATE_EPOCH"))
	if err != nil {
		return err
	}

	var images []built
	for _, b := range []agentBinary{{"amd64", *amd64}, {"arm64", *arm64}} {
		if b.path == "" {
			continue
		}
		image, err := buildImage(b, labels(*version, *licence), created)
		if err != nil {
			return err
		}
		images = append(images, image)
	}
	if len(images) == 0 {
		return errors.New("no binary: give --bin-amd64 FILE, --bin-arm64 FILE or both")
	}
	index := buildIndex(images, labels(*version, *licence))
	digest, err := index.Digest()
	if err != nil {
		return fmt.Errorf("computing the index's digest: %w", err)
	}
	if *out != "" {
		if err := writeArchive(*out, tag, index, images); err != nil {
			return err
		}
	}
	if *push != "" {
		if err := pushIndex(ctx, target, index); err != nil {
			return err
		}
	}
	fmt.Fprintf(stdout, "%s\n  index  %s\n", fullName(tag), digest)
	for _, b := range images {
		fmt.Fprintf(stdout, "  %s  %s  %.2f MB compressed\n", b.arch, b.digest, float64(b.compressed)/1e6)
	}
	if *push != "" {
		fmt.Fprintf(stdout, "pushed %s@%s\n", fullName(target), digest)
	}
	return nil
}

// creationTime is the image's time: SOURCE_DATE_EPOCH in seconds, as
// reproducible-builds.org has it, or 1970. The clock would change the digest.
func creationTime(epoch string) (time.Time, error) {
	if epoch == "" {
		epoch = "0"
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("reading SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// pushIndex uploads all architectures under one tag. A registry on loopback is
// spoken to without TLS.
func pushIndex(ctx context.Context, target name.Tag, index v1.ImageIndex) error {
	err := remote.WriteIndex(target, index, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain))
	if err != nil {
		return fmt.Errorf("pushing %s: %w", target, err)
	}
	return nil
}
