# The four static binaries and nothing else: no shell, no libraries, no package manager.
# Build it with `make image`, which builds the binaries first.
FROM scratch
COPY bin/sallyport bin/sallyport-agent bin/sallyport-proxy bin/sallyport-collector /
ENTRYPOINT ["/sallyport-agent"]
