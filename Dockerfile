# The one image of every program: a static binary, no shell, no root. `docker compose build` makes it; the base images
# are named in .env.
ARG GOLANG_IMAGE
ARG STATIC_IMAGE

FROM ${GOLANG_IMAGE} AS build
WORKDIR /src
# Where Go gets modules from is up to whoever builds; empty means Go's defaults.
ARG GOPROXY
ARG GOSUMDB
COPY . .
# No step of its own for the modules: the caches outlive a change of go.mod, and hold only what the binary needs.
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -buildvcs=false -o /out/wharf ./cmd/wharf && mkdir /out/data

FROM ${STATIC_IMAGE}
COPY --from=build /out/wharf /usr/local/bin/wharf
# A new volume takes over the owner of the directory that it is mounted on.
COPY --from=build --chown=65532:65532 /out/data /data
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["wharf"]
CMD ["--help"]
